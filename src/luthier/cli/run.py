"""`luthier run`: look at run directories."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.options import Json, Run, run_named
from luthier.cli.show import print_json, print_runs, print_summary
from luthier.cli.show_several import print_several
from luthier.core.errors import RecipeError
from luthier.core.paths import RUNS

app = typer.Typer(help="List runs and look at one.", no_args_is_help=True, rich_markup_mode=None)


@app.command("list")
def list_(
    folder: Annotated[Path, typer.Argument(help="Folder that holds runs.")] = Path(RUNS), json: Json = False
) -> None:
    """List the runs of a folder.

    \b
    Examples:
      luthier run list
      luthier run list runs --json
    """
    from luthier.store.listing import list_runs

    # Before the first run its usual folder is not there yet, and that is no mistake.
    if not folder.is_dir() and folder != Path(RUNS):
        raise RecipeError(f"there is no folder {folder}", do="name the folder that holds the runs; it is usually runs")
    rows = [row.as_dict() for row in list_runs(folder)]
    print_json({"runs": rows}) if json else print_runs(rows)


@app.command("show")
def show(run: Run, json: Json = False) -> None:
    """Show what a run did and where its files are.

    \b
    Examples:
      luthier run show runs/2026-11-20-my-first
      luthier run show runs/2026-11-20-my-first --json
    """
    folder = run_named(run)
    status = folder.status()
    found = {"run": str(folder.folder), "state": status.state, "reason": status.reason, **(status.values or {})}
    if json:
        print_json(found)
    elif status.state == "finished":
        print_several(found, again=True) if "adapters" in found else print_summary(found, again=True)
    else:
        typer.echo(f"{folder.folder}: {status.state}{f' ({status.reason})' if status.reason else ''}")
        typer.echo(f"next    luthier resume {folder.folder}")
