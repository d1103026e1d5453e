"""`luthier merge`: several models as one, streamed, proved, and held against its parents."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli.options import DryRun, Json, Quiet, Set
from luthier.cli.show import print_json
from luthier.core.errors import RecipeError, advised
from luthier.core.imports import uncollected
from luthier.core.units import bytes_text, percent_text

if TYPE_CHECKING:
    from luthier.recipes.merging.merge import Gate
    from luthier.recipes.merging.recipe import MergeRecipe

_SHOWN_ROLES = 16
_ADVICE = "luthier merge --help shows the options, luthier describe METHOD the knobs of a method"


def merge(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Models (runs, folders, hub ids), or one recipe file.")
    ],
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="New folder for the merged model.")] = None,
    method: Annotated[str, typer.Option(metavar="NAME", help="How tensors are merged.")] = "slerp",
    base: Annotated[str | None, typer.Option(metavar="MODEL", help="The model that all of them come from.")] = None,
    t: Annotated[float | None, typer.Option("--t", metavar="X", help="How far from the first to the second.")] = None,
    weight: Annotated[
        list[float] | None, typer.Option("--weight", metavar="X", help="A model's weight; once for each model.")
    ] = None,
    density: Annotated[float | None, typer.Option(metavar="X", help="Share of the changes that is kept.")] = None,
    set_: Set = None,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="FILE", help="Rows on which the result must not be worse.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", metavar="NAME", help="What judges answers; empty is likelihood.")
    ] = None,
    allow_worse: Annotated[bool, typer.Option("--allow-worse", help="Keep a result that is worse.")] = False,
    adapters: Annotated[
        bool, typer.Option("--adapters", help="Merge LoRA adapters (PEFT folders or runs) into one adapter.")
    ] = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge models of one shape, or adapters of one base, into a new folder.

    \b
    Examples:
      luthier merge runs/mine Qwen/Qwen2.5-0.5B-Instruct --method slerp --t 0.4 --out models/mine-instruct
      luthier merge merge.yaml --out models/merged --data held_out.jsonl --json
    """
    with advised(_ADVICE):
        if not dry_run:
            _require_out(out, models)
        given = _set(set_ or [])
        if adapters:
            _merge_adapters(models, out, method, weight, given, dry_run=dry_run, json=json)
            return
        knobs = {"t": t, "density": density}
        recipe, notes = _recipe(models, method, base=base, weights=weight, knobs=knobs, sets=given)
        gate = _gate(data, metric, allow_worse=allow_worse)
        with uncollected():
            from luthier.recipes.merging.merge import merge_models, opened

        if dry_run:
            with opened(recipe) as opening:
                planned = {"recipe": recipe.model_dump(mode="json"), **opening.as_dict()}
            planned["notices"] = [*notes, *planned["notices"]]
            print_json(planned) if json else _print_plan(planned)
            return
        with _progress(quiet=quiet or json) as told:
            found = merge_models(recipe, out or Path(), gate=gate, told=told)
        found["notices"] = [*notes, *found["notices"]]
        print_json(found) if json else _print_found(found)


def _require_out(out: Path | None, models: list[str]) -> None:
    """Raise where nothing can be written, before what takes seconds to import."""
    if out is None:
        raise RecipeError(
            f"no folder for the result of merging {', '.join(models)}", allowed="a new folder: --out DIR"
        )
    from luthier.store.folder import require_new

    require_new(out)


def _recipe(
    models: list[str], method: str, *, base: str | None, weights: list[float] | None,
    knobs: Mapping[str, float | None], sets: Mapping[str, Any],
) -> tuple[MergeRecipe, Sequence[str]]:
    """The recipe that the command line says, or names, and what is to be told of it."""
    with uncollected():
        from luthier.recipes.merging.recipe import from_flags, is_recipe, read_recipe

    if len(models) == 1 and is_recipe(models[0]):
        return read_recipe(Path(models[0]), sets=sets)
    return from_flags(models, method, base=base, weights=weights, knobs=knobs, sets=sets), ()


def _set(assignments: list[str]) -> Mapping[str, Any]:
    from luthier.core.yaml_text import parse_value

    found = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"--set {assignment}", allowed="--set key=value", do="for example --set dtype=float32")
        found[key.strip()] = parse_value(value, name=f"--set {key.strip()}")
    return found


def _gate(data: Path | None, metric: str | None, *, allow_worse: bool) -> Gate | None:
    if data is None and metric is None:
        return None
    with uncollected():
        from luthier.recipes.merging.gate import gate_of

    return gate_of(data, metric, allow_worse=allow_worse)


def _merge_adapters(
    models: list[str], out: Path | None, method: str, weights: list[float] | None, given: Mapping[str, Any], *,
    dry_run: bool, json: bool,
) -> None:  # fmt: skip
    with uncollected():
        from luthier.recipes.merging.adapters import AdapterKnobs, merge_adapters, planned_adapters

    knobs = AdapterKnobs.from_flags(models, method, weights, given)
    if dry_run or out is None:
        found = planned_adapters(knobs)
        print_json(found) if json else typer.echo(
            f"{found['method']} of {len(found['adapters'])} adapters, {found['modules']} modules, rank {found['rank']}"
        )
        return
    found = merge_adapters(knobs, out)
    if json:
        print_json(found)
        return
    typer.echo(f"adapter    {found['folder']}, {found['modules']} modules, rank {found['rank']}, {found['method']}")
    cut = found["parity"]["cut"]
    more = "" if cut is None else f": {cut['numbers']}"
    typer.echo(f"lost       {percent_text(found['lost'])} of the norm of the merged change{more}")
    typer.echo(f"parity     {_told_parity(found['parity'])}")


def _told_parity(parity: Mapping[str, Any]) -> str:
    """What was measured of the result, in one line; or why nothing was."""
    return str(parity.get("numbers") or f"logits were not compared: {parity['not_compared']}")


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Any]:
    """Bytes as they are written, on stderr; nothing where nobody watches."""
    done = 0

    def told(count: int) -> None:
        nonlocal done
        before, done = done, done + count
        if sys.stderr.isatty() and before // 10**8 != done // 10**8:
            sys.stderr.write(f"\rwritten    {bytes_text(done)} ")
            sys.stderr.flush()

    yield (lambda _count: None) if quiet else told
    if not quiet and done and sys.stderr.isatty():
        sys.stderr.write("\n")


def _print_plan(planned: Mapping[str, Any]) -> None:
    """What would be read, written and held."""
    method = planned["method"]
    knobs = ", ".join(f"{key} {value}" for key, value in method.items() if key != "method")
    looks = f"{planned['looks']} looks before the merge"
    typer.echo(f"method     {method['method']}{f' ({knobs})' if knobs else ''}, {looks}")
    for parent in planned["parents"]:
        typer.echo(f"read       {parent['model']}, {bytes_text(parent['bytes'])}")
    typer.echo(f"write      {planned['tensors']} tensors in {planned['dtype']}, {bytes_text(planned['writes_bytes'])}")
    typer.echo(f"memory     {bytes_text(planned['memory_bytes'])} at most beside the program")
    for notice in planned["notices"]:
        typer.echo(f"note       {notice}")


def _print_found(found: Mapping[str, Any]) -> None:
    """The result: by role, and beside its parents."""
    for notice in found["notices"]:
        typer.echo(f"note       {notice}")
    if "lerp_tensors" in found:
        lerp, whole = found["lerp_tensors"], found["lerp_tensors"] + found["slerp_tensors"]
        more = "; their models are almost parallel: --set method.of=changes turns what they changed" if lerp else ""
        typer.echo(f"slerp      {whole - lerp} tensors, {lerp} more are a straight line (|cos| > 0.9995){more}")
    for line in found["roles"][:_SHOWN_ROLES]:
        told = [f"cosine {line['cosine']:.4f}"] if "cosine" in line else []
        told += [f"angle {line['angle_degrees']:.2f}"] if "angle_degrees" in line else []
        told += [f"conflict {percent_text(line['sign_conflict'])}"] if "sign_conflict" in line else []
        head = f"{line['role']:10} {line['tensors']:4} tensors  change {percent_text(line['change'])}"
        typer.echo("  ".join([head, *told]))
    if evaluation := found["evaluation"]:
        for name, score in evaluation["parents"].items():
            typer.echo(f"parent     {evaluation['measure']} {score:.4f}  {name}")
        typer.echo(f"merged     {evaluation['measure']} {evaluation['merged']:.4f}  (expected of the mean "
                   f"{evaluation['expected']:.4f}, improvement over the best {evaluation['improvement']:+.4f}, "
                   f"diversity {evaluation['diversity']:.4f})")  # fmt: skip
    typer.echo(f"parity     {_told_parity(found['parity'])}")
    typer.echo(f"folder     {found['folder']}, {bytes_text(found['writes_bytes'])}, {found['tensors']} tensors; "
               f"{found['proved_tensors']} of them computed anew and found equal")  # fmt: skip
