"""`luthier plan`: what a fine-tune or a server would take, before anything is loaded."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.cli.options import Json, Set
from luthier.cli.show import print_json
from luthier.cli.show_plan import print_explained, print_inference, print_needs
from luthier.core.errors import CorruptError, RecipeError, advised
from luthier.core.imports import uncollected

ModelConfig = Annotated[
    Path | None, typer.Option("--model-config", metavar="FILE", help="config.json of a model, its folder, or its name.")
]


_OF_A_RECIPE = {"recipe", "set_", "json"}
_OF_ANSWERING = {"model_config", "inference", "clients", "context", "precision", "quantizer", "memory", "tflops",
                 "bandwidth", "json"}  # fmt: skip
_ONLY_ANSWERING = {"inference", "clients", "context"}
_OF_A_MACHINE = {"memory", "devices", "sharding", "tflops", "bandwidth", "efficiency"}
_ADVICE = "luthier plan --help shows the options, luthier describe METHOD the knobs of a method"


def plan(
    ctx: typer.Context,
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
    given = _given(ctx)
    if (recipe is None) == (model_config is None):
        which = "both" if recipe else "neither"
        raise RecipeError(f"{which} of RECIPE.yaml and --model-config is given", allowed="one of the two",
                          do="luthier plan RECIPE.yaml, or luthier plan --model-config FILE")  # fmt: skip
    if recipe is not None:
        _of_recipe(recipe, set_ or [], given, as_json=json)
        return
    config = model_config or Path()
    if inference:
        _require_none(given - _OF_ANSWERING, "--inference")
        _of_inference(config, (clients, context), precision, quantizer, memory, (tflops, bandwidth), as_json=json)
        return
    _require_none(given & _ONLY_ANSWERING, "training: they are for --inference")
    wanted = {
        "sequence": sequence, "batch": batch, "device": device, "devices": devices, "sharding": sharding,
        "precision": precision, "optimizer.method": optimizer, "quantizer.method": quantizer,
    }  # fmt: skip
    options = {key: value for key, value in wanted.items() if value is not None}
    _of_config(
        config, method, set_ or [], options, memory=memory, rates=(tflops, bandwidth, efficiency),
        run=(tokens, price), explain=explain, as_json=json,
    )  # fmt: skip


def _given(ctx: typer.Context) -> set[str]:
    """The options that are on the command line."""
    return {name for name in ctx.params if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"}


def _require_none(unread: set[str], what: str) -> None:
    """Raise RecipeError for options that nobody would read."""
    if unread:
        names = ", ".join(f"--{name.rstrip('_').replace('_', '-')}" for name in sorted(unread))
        raise RecipeError(f"{names} with {what}", do=f"leave {names} out")


def _require_no_model(recipe: Path) -> None:
    """Raise RecipeError for a model, or the config of one, in the place of a recipe."""
    config = recipe / "config.json" if recipe.is_dir() else recipe
    if config.suffix != ".json" or not config.is_file():
        return
    from luthier.data.hub import read_json

    model = False
    with suppress(CorruptError):
        # What is wrong with it otherwise is told by those who read all of it.
        model = "model_type" in read_json(config)
    if model:
        raise RecipeError(f"{recipe} is a model, and no recipe", do=f"luthier plan --model-config {recipe}")


def _of_recipe(recipe: Path, sets: list[str], given: set[str], *, as_json: bool) -> None:
    _require_no_model(recipe)
    machines = "a recipe, which is planned for the machine that this is: see --model-config for others"
    _require_none(given & _OF_A_MACHINE, machines)
    _require_none(given - _OF_A_RECIPE, "a recipe, which says all of it: see --set")
    with uncollected():
        from luthier.recipes.planning.of_recipe import plan_file

    found = plan_file(recipe, sets)
    print_json(found) if as_json else print_needs(found)


@advised(_ADVICE)
def _of_config(
    config: Path,
    method: str,
    sets: list[str],
    options: dict[str, Any],
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
        from luthier.recipes.planning.asked import answered, asked
        from luthier.recipes.planning.plan import Machine

    tokens, price = run
    found = answered(config, asked(method, sets, limit, options=options), Machine.of(*rates),
                     tokens=tokens, price=price, explain=explain)  # fmt: skip
    if as_json:
        print_json(found)
        return
    print_needs(found)
    print_explained(found.get("formulas", {}))


@advised(_ADVICE)
def _of_inference(
    config: Path, load: tuple[int, int], precision: str, quantizer: str | None, memory: str | None,
    rates: tuple[float | None, float | None], *, as_json: bool,
) -> None:  # fmt: skip
    """No torch is needed for this, unless weights are packed: a quantizer says itself what they take."""
    from luthier.core.units import bytes_from
    from luthier.recipes.planning.inference import plan_inference

    (clients, context), (tflops, bandwidth) = load, rates
    packed = None
    if quantizer is not None:
        from luthier.recipes.planning.asked import packed_bytes

        packed = packed_bytes(quantizer)
    found = plan_inference(
        config, clients=clients, context=context, precision="bfloat16" if precision == "auto" else precision,
        packed=packed, memory=None if memory is None else bytes_from(memory),
        flops=None if tflops is None else tflops * 1e12, bandwidth=None if bandwidth is None else bandwidth * 1e9,
    )  # fmt: skip
    print_json(found) if as_json else print_inference(found, clients, context)
