"""`luthier probe`: what tuning did to a model, in sentences, as JSON and on a page with pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli.options import DryRun, Json, Quiet, Set, run_named
from luthier.cli.show import print_json
from luthier.core.errors import RecipeError
from luthier.core.imports import uncollected

if TYPE_CHECKING:
    from luthier.core.events import Recorder
    from luthier.recipes.probed import Probed

NEW = Path("probes")


def probe(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="Run directory.", show_default=False)] = None,
    before: Annotated[str, typer.Option("--before", metavar="MODEL", help="Instead of a run: the base model.")] = "",
    after: Annotated[
        str, typer.Option("--after", metavar="MODEL", help="And what was tuned from it: a model, or an adapter.")
    ] = "",
    names: Annotated[
        list[str] | None,
        typer.Option("--probe", metavar="NAME", help="Only this probe; repeatable. Without any: all that are cheap."),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option("--keep", metavar="FILE", help="Text or rows whose loss tells what was forgotten; repeatable."),
    ] = None,
    mitigate: Annotated[
        str,
        typer.Option("--mitigate", metavar="X,X,...", help="Scale intruder dimensions by these, and measure it."),
    ] = "",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="New folder for the adapter with them scaled.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="DIR", help="Folder of JSON and page; RUN/probes by default.")
    ] = None,
    set_: Set = None,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tell what tuning did to a model: directions, ranks, norms, what was forgotten, and what to do about it.

    \b
    Examples:
      luthier probe runs/2026-11-20-my-first --probe intruder_dimensions --probe forgetting --keep old_text.txt
      luthier probe --before Qwen/Qwen2.5-0.5B --after models/mine --set intruder_dimensions.k=5
    """
    with uncollected():
        from luthier.recipes.mitigate import mitigated
        from luthier.recipes.probe import PROBES, chosen_probes, probe_pair, split_by_cost
        from luthier.recipes.progress import progress

    factors = _factors(mitigate)
    if out is not None and not factors:
        do = "say by what to scale intruders: --mitigate 0.5"
        raise RecipeError(f"--out {out} is given without --mitigate", do=do)
    chosen = chosen_probes(names or [], set_ or [])
    folder = report or (NEW if run is None else run / PROBES)
    with progress(quiet=quiet) as recorder:
        probed = _opened(run, before, after, keep or [], recorder)
        made, left_out = split_by_cost(chosen, probed.pair, named=bool(names))
        if dry_run:
            planned = ["mitigation"] if factors else [one.method_name() for one in made]
            _print_plan(planned, left_out, str(folder), json=json)
            return
        if factors:
            results = mitigated(probed, factors, folder, out=out)
        else:
            results = probe_pair(probed, made, folder, left_out=left_out, recorder=recorder)
    print_json(results) if json else _print(results, out)


def _opened(run: Path | None, before: str, after: str, keep: list[str], recorder: Recorder) -> Probed:
    from luthier.recipes.probed import probed_folders, probed_run

    if run is not None and not before and not after:
        return probed_run(run_named(run), keep, recorder=recorder)
    if run is None and before and after:
        return probed_folders(before, after, keep, recorder=recorder)
    raise RecipeError(
        "what to look at is not clear", allowed="a run, or both --before and --after", do="luthier probe RUN"
    )


def _factors(text: str) -> list[float]:
    """The lambdas of `--mitigate`."""
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = [-1.0]
    if any(not 0 <= each <= 10 for each in found):
        raise RecipeError(f"--mitigate {text}", allowed="numbers from 0 to 10 with commas, such as 0,0.5,1")
    return found


def _print_plan(made: list[str], left_out: Mapping[str, str], folder: str, *, json: bool) -> None:
    if json:
        print_json({"probes": made, "left_out": dict(left_out), "folder": folder})
        return
    typer.echo(f"probes     {', '.join(made) or 'none'}")
    for name, why in left_out.items():
        typer.echo(f"left out   {name}: {why}")
    typer.echo(f"would go   to {folder}")


def _print(found: Mapping[str, Any], out: Path | None) -> None:
    """What each probe says, and where the rest is."""
    for name, report in found["probes"].items():
        typer.echo(name)
        for sentence in report["verdict"]:
            typer.echo(f"  {sentence}")
    for name, why in found["left_out"].items():
        typer.echo(f"left out   {name}: {why}")
    if out is not None and out.is_dir():
        typer.echo(f"adapter    {out}")
    typer.echo(f"page       {found['page']}")
