"""Options that several commands share, so that they are spelled and explained once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from luthier.core.errors import RecipeError

if TYPE_CHECKING:
    from luthier.store.runs import RunDirectory

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and write nothing.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set a recipe key, such as adapter.rank=32.")
]
DRAFTED = 4
"""Tokens that a draft model looks ahead where nothing is said of it."""
Drafts = Annotated[
    int, typer.Option(metavar="N", help="Tokens to look ahead where a text repeats itself; the text is the same.")
]
DraftModel = Annotated[
    str | None,
    typer.Option(metavar="RUN|MODEL", help="Smaller model of the same vocabulary that looks ahead instead."),
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.", show_default=False)]


def run_named(run: Path) -> RunDirectory:
    """The run that an argument names. Raises RecipeError with the nearest runs when it names none."""
    from luthier.store.runs import RunDirectory, is_run

    if not is_run(run):
        raise _no_run(str(run), _runs_like(run))
    return RunDirectory.open(run)


def require_no_lost_run(name: str) -> None:
    """Raise RecipeError when `name` is nothing here but nearly a run: it is hardly a model of the hub then."""
    if not Path(name).exists() and (close := _runs_like(Path(name))):
        raise _no_run(name, close)


def _runs_like(place: Path) -> list[str]:
    from luthier.core.nearest import nearest
    from luthier.store.runs import is_run

    if place.is_dir() or not place.parent.is_dir():
        return []
    runs = [path.name for path in place.parent.iterdir() if is_run(path)]
    return [str(place.parent / name) for name in nearest(place.name, runs)]


def _no_run(name: str, close: list[str]) -> RecipeError:
    do = f"did you mean {' or '.join(close)}?" if close else "name a run directory; luthier run list FOLDER shows them"
    return RecipeError(f"{name} is no run", do=do)
