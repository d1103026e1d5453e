"""`luthier export`: a tuned model in the form that another program reads, kept only if it is the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.options import DryRun, Json, Quiet, Set, require_no_lost_run
from luthier.cli.show import print_json
from luthier.core.errors import RecipeError
from luthier.core.imports import uncollected


def export(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Run directory, model folder, hub id, or seedling.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="New folder for the artefact.")],
    to: Annotated[
        str, typer.Option("--to", metavar="NAME", help="The form: merged, peft, ...; describe exporters lists them.")
    ] = "merged",
    adapter: Annotated[
        str | None, typer.Option("--adapter", metavar="DIR", help="An adapter in PEFT's format on top of a model.")
    ] = None,
    set_: Set = None,
    precision: Annotated[str, typer.Option(metavar="NAME", help="auto, float32 or bfloat16, to compute in.")] = "auto",
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu or cuda.")] = "auto",
    dry_run: DryRun = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Write a model for another program, read it back, and compare it with what it was made from.

    \b
    Examples:
      luthier export runs/2026-11-20-my-first --to merged --out models/my-first
      luthier export runs/2026-11-20-my-first --to merged --set exporter.precision=bfloat16 --out my-bf16 --json
    """
    if precision not in ("auto", "float32", "bfloat16"):
        raise RecipeError(f"precision is {precision!r}", allowed="auto, float32 or bfloat16")
    require_no_lost_run(source)
    with uncollected():
        from luthier.core.recipe_file import read_layers, validated
        from luthier.recipes.exporting.export import ExportKnobs, Source, lines_of
        from luthier.recipes.exporting.export import export as run_export
        from luthier.recipes.progress import teller

    layered = read_layers(None, sets=set_ or [], defaults={"exporter": {"method": to}}, known=("exporter",))
    chosen = validated(ExportKnobs, layered).exporter

    asked = Source(name=source, adapter=adapter, precision=precision, device=device)  # type: ignore[arg-type]  # checked
    found = run_export(asked, chosen, out, dry=dry_run, told=teller(quiet=quiet))
    if json:
        print_json(found)
        return
    for line in lines_of(found):
        typer.echo(line)
