"""`luthier resume`: go on with a run that stopped."""

from __future__ import annotations

from typing import Annotated

import typer

from luthier.cli.options import DryRun, Json, Quiet, Run
from luthier.cli.show import print_json, print_summary
from luthier.recipes.progress import progress


def resume(
    run: Run,
    accept_drift: Annotated[
        bool, typer.Option("--accept-drift", help="Go on although versions, data or recipe have changed.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    dry_run: DryRun = False,
) -> None:
    """Go on with a run from its last good checkpoint, bit for bit as if it had not stopped.

    \b
    Examples:
      luthier resume runs/2026-11-20-my-first
      luthier resume runs/2026-11-20-my-first --json
    """
    from luthier.recipes.finetune import resume as go_on
    from luthier.store.runs import RunDirectory

    folder = RunDirectory.open(run)
    if dry_run:
        status = folder.status()
        print_json({"run": str(folder.folder), "state": status.state, **(status.values or {})})
        return
    with progress(quiet=quiet) as recorder:
        result = go_on(folder, recorder=recorder, accept_drift=accept_drift)
    print_json(result.line()) if json else print_summary(result.summary)
