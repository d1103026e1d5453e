"""`luthier plan`: what a fine-tune or a server would take, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.cli.options import Json, Set
from luthier.cli.show import print_json
from luthier.cli.show_plan import print_explained, print_inference, print_needs
from luthier.core.errors import RecipeError
from luthier.core.imports import uncollected

ModelConfig = Annotated[
    Path | None, typer.Option("--model-config", metavar="FILE", help="config.json of a model, or its folder.")
]


def plan(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE.yaml]", help="Recipe file.", show_default=False)
    ] = None,
    model_config: ModelConfig = None,
    method: Annotated[str, typer.Option("--method", metavar="NAME", help="lora, qlora, full, galore, ...")] = "lora",
    sequence: Annotated[int, typer.Option(metavar="N", help="Tokens of a row.")] = 2048,
    batch: Annotated[int, typer.Option(metavar="N", help="Rows at once, on each device.")] = 1,
    optimizer: Annotated[str | None, typer.Option(metavar="NAME", help="Another optimizer than the method's.")] = None,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Memory of a device, such as 24GB.")] = None,
    device: Annotated[str, typer.Option(metavar="KIND", help="auto (what is here), cpu or cuda.")] = "auto",
    devices: Annotated[int, typer.Option(metavar="N", help="How many of them.")] = 1,
    sharding: Annotated[str, typer.Option(metavar="WAY", help="none, zero1, zero2, zero3 or fsdp.")] = "none",
    precision: Annotated[str, typer.Option(metavar="NAME", help="auto, float32 or bfloat16.")] = "auto",
    tflops: Annotated[float | None, typer.Option(metavar="X", help="Rate of products; empty measures.")] = None,
    bandwidth: Annotated[float | None, typer.Option(metavar="X", help="Rate of memory in GB/s.")] = None,
    efficiency: Annotated[float, typer.Option(metavar="X", help="Share of these rates that is reached.")] = 1.0,
    tokens: Annotated[float | None, typer.Option(metavar="N", help="Tokens of the run, for time and price.")] = None,
    price: Annotated[float | None, typer.Option(metavar="X", help="Price of a device and hour.")] = None,
    inference: Annotated[bool, typer.Option("--inference", help="Plan answering instead of training.")] = False,
    clients: Annotated[int, typer.Option(metavar="N", help="Texts that are answered at once.")] = 1,
    context: Annotated[int, typer.Option(metavar="N", help="Tokens of each of these texts.")] = 2048,
    quantizer: Annotated[str | None, typer.Option(metavar="NAME", help="How weights are packed: nf4, ...")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Print the formulas with the numbers put in.")] = False,
    set_: Set = None,
    json: Json = False,
) -> None:
    """Tell what training would take: parameters, memory, FLOPs, time; whether it fits, and what would.

    For a recipe, everything is laid out as for a run. For a config alone, no weights are needed.

    \b
    Examples:
      luthier plan recipe.yaml --set adapter.rank=64
      luthier plan --model-config config.json --method qlora --sequence 4096 --memory 24GB --device cuda
    """
    if (recipe is None) == (model_config is None):
        which = "both" if recipe else "neither"
        raise RecipeError(f"{which} of RECIPE.yaml and --model-config is given", allowed="one of the two")
    if recipe is not None:
        _of_recipe(recipe, set_ or [], as_json=json)
        return
    config = config_file(model_config or Path())
    if inference:
        found = _of_inference(config, clients, context, precision, quantizer, memory, tflops, bandwidth)
        print_json(found) if json else print_inference(found, clients, context)
        return
    given = {
        "sequence": sequence, "batch": batch, "device": device, "devices": devices, "sharding": sharding,
        "precision": precision, "optimizer.method": optimizer, "quantizer.method": quantizer,
    }  # fmt: skip
    sets = [f"{key}={value}" for key, value in given.items() if value is not None]
    _of_config(
        config, method, [*sets, *(set_ or [])], memory=memory, rates=(tflops, bandwidth, efficiency),
        run=(tokens, price), explain=explain, as_json=json,
    )  # fmt: skip


def config_file(place: Path) -> Path:
    """The config.json that a path means."""
    found = place / "config.json" if place.is_dir() else place
    if not found.is_file():
        raise RecipeError(f"there is no {found}", allowed="the config.json of a model, or a folder with one")
    return found


def _of_recipe(recipe: Path, sets: list[str], *, as_json: bool) -> None:
    with uncollected():
        from luthier.recipes.files import load_recipe
        from luthier.recipes.plan_recipe import plan_recipe
        from luthier.recipes.several_recipe import names_several

    if names_several(recipe, sets):
        raise RecipeError(
            f"{recipe} trains several adapters", allowed="recipes with one", do="use luthier train --dry-run"
        )
    found = plan_recipe(load_recipe(recipe, overrides=sets).recipe)
    print_json(found) if as_json else print_needs(found)


def _of_config(
    config: Path,
    method: str,
    sets: list[str],
    *,
    memory: str | None,
    rates: tuple[float | None, float | None, float],
    run: tuple[float | None, float | None],
    explain: bool,
    as_json: bool,
) -> None:
    from luthier.core.units import bytes_from

    limit = None if memory is None else bytes_from(memory)
    with uncollected():
        from luthier.recipes.plan import Machine, cost, lay, plan_training
        from luthier.recipes.plan_asked import asked
        from luthier.recipes.plan_explained import explained
        from luthier.recipes.plan_fits import advice, largest

    laid = lay(config, asked(method, sets, limit))
    tflops, bandwidth, efficiency = rates
    machine = Machine(
        None if tflops is None else tflops * 1e12, None if bandwidth is None else bandwidth * 1e9, efficiency
    )
    found: dict[str, Any] = plan_training(laid, machine)
    if (tokens := run[0]) is not None:
        found["cost"] = cost(found, tokens, run[1])
    lines = explained(laid, found) if explain else []
    found |= {"largest": largest(laid), "advice": advice(config, laid)}
    if as_json:
        print_json({**found, **({"formulas": dict(lines)} if explain else {})})
        return
    print_needs(found)
    print_explained(lines)


def _of_inference(
    config: Path, clients: int, context: int, precision: str, quantizer: str | None, memory: str | None,
    tflops: float | None, bandwidth: float | None,
) -> dict[str, Any]:  # fmt: skip
    """No torch is needed for this, unless weights are packed: a quantizer says itself what they take."""
    from luthier.core.units import bytes_from
    from luthier.recipes.plan_inference import NUMBERS, plan_inference
    from luthier.store.files import read_json

    precision = "bfloat16" if precision == "auto" else precision
    if precision not in NUMBERS or clients < 1 or context < 1:
        raise RecipeError(
            f"precision {precision!r}, {clients} clients, {context} tokens",
            allowed=f"{', '.join(NUMBERS)}; and at least 1 of each",
        )
    packed = None
    if quantizer is not None:
        from luthier.recipes.plan_asked import packed_bytes

        packed = packed_bytes(quantizer)
    return plan_inference(
        read_json(config), clients=clients, context=context, precision=precision, packed=packed,
        memory=None if memory is None else bytes_from(memory), flops=None if tflops is None else tflops * 1e12,
        bandwidth=None if bandwidth is None else bandwidth * 1e9,
    )  # fmt: skip
