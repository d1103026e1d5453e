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
from luthier.core.units import bytes_text

if TYPE_CHECKING:
    from luthier.recipes.probing.mitigate import Scaling

MITIGATION = "mitigation"
"""What its knobs are set under, as those of a probe are under its name."""


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
        str | None,
        typer.Option(
            "--mitigate", metavar="X,X,...", help="Scale intruders by these; --set mitigation.k, mitigation.epsilon."
        ),
    ] = None,
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
        from luthier.recipes.probing.diagnose import Asked, diagnose, planned
        from luthier.recipes.probing.probe import chosen_probes
        from luthier.recipes.progress import progress

    if run is not None:
        run_named(run)
    own = [each for each in set_ or [] if each.strip().startswith(f"{MITIGATION}.")]
    sets = [each for each in set_ or [] if each not in own]
    asked = Asked(
        run=run, before=before, after=after, keep=keep or [],
        probes=chosen_probes(names or [], sets) if names or sets else (), named=bool(names),
        scaling=_scaling(mitigate, own), out=out, report=report,
    )  # fmt: skip
    with progress(quiet=quiet) as recorder:
        if dry_run:
            told = planned(asked, recorder=recorder)
            print_json(told) if json else _print_plan(told)
            return
        found = diagnose(asked, recorder=recorder)
    print_json(found) if json else _print(found, out)


def _scaling(text: str | None, sets: list[str]) -> Scaling | None:
    """What `--mitigate` and `--set mitigation.KNOB=VALUE` say together."""
    from luthier.core.knobs import validate
    from luthier.recipes.probing.mitigate import Scaling
    from luthier.recipes.probing.probe import knobs_of

    if text is None:
        if sets:
            raise RecipeError(f"--set {sets[0]} without --mitigate", do="say by what to scale: --mitigate 0,0.5,1")
        return None
    try:
        factors = [float(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(
            f"--mitigate {text!r}", allowed="numbers from 0 to 10 with commas", do="for example --mitigate 0,0.5,1"
        ) from None
    return validate(Scaling, {"factors": factors, **knobs_of(sets, [MITIGATION]).get(MITIGATION, {})})


def _print_plan(planned: Mapping[str, Any]) -> None:
    typer.echo(f"probes     {', '.join(planned['probes']) or 'none'}")
    for name, why in planned["left_out"].items():
        typer.echo(f"left out   {name}: {why}")
    typer.echo(f"would go   to {planned['folder']}")


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
    if cache := found["cache"]:
        taken, most = bytes_text(cache["bytes"]), bytes_text(cache["most_bytes"])
        what = f"{cache['files']} decomposed matrices of bases, {taken} of at most {most}"
        typer.echo(f"cache      {what}, in {cache['folder']}; delete it to have the room back")
    typer.echo(f"page       {found['page']}")
