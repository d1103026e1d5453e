"""`luthier quantize`: a model folder with packed weights, which transformers loads too."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.options import Json, Set
from luthier.cli.show import print_json
from luthier.core.errors import RecipeError
from luthier.core.imports import uncollected
from luthier.core.units import bytes_text


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, hub id, or seedling.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="New folder for the packed model.")],
    quantizer: Annotated[
        str, typer.Option("--quantizer", metavar="NAME", help="How weights are packed: nf4.")
    ] = "nf4",
    set_: Set = None,
    precision: Annotated[str, typer.Option(metavar="NAME", help="auto, float32 or bfloat16.")] = "auto",
    json: Json = False,
) -> None:
    """Write a model with packed weights into a new folder, read it back, and compare.

    \b
    Examples:
      luthier quantize Qwen/Qwen2.5-0.5B --out models/qwen-nf4
      luthier quantize seedling --quantizer nf4 --set quantizer.block=128 --out seedling-nf4 --json
    """
    if precision not in ("auto", "float32", "bfloat16"):
        raise RecipeError(f"precision is {precision!r}", allowed="auto, float32 or bfloat16")
    with uncollected():
        from luthier.core.recipe_file import read_layers, validated
        from luthier.recipes.opening.quantize import QuantizeKnobs, quantize_model

    layered = read_layers(None, sets=set_ or [], defaults={"quantizer": {"method": quantizer}}, known=("quantizer",))
    chosen = validated(QuantizeKnobs, layered).quantizer
    found = quantize_model(model, chosen, out, precision=precision)  # type: ignore[arg-type]  # checked above
    if json:
        print_json(found)
        return
    for notice in found["notices"]:
        typer.echo(f"note       {notice}")
    sizes = found["weights"]
    typer.echo(f"weights    {bytes_text(sizes['before'])}, now {bytes_text(sizes['after'])}")
    typer.echo(f"folder     {found['folder']}, {bytes_text(found['bytes'])}, computes what it was written from")
