"""`luthier resume`: go on with a run that stopped."""

from __future__ import annotations

from typing import Annotated

import typer

from luthier.cli.options import DryRun, Json, Quiet, Run, run_named
from luthier.cli.show import print_json, print_summary
from luthier.cli.show_feedback import print_feedback
from luthier.cli.show_several import print_several
from luthier.core.imports import uncollected
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
    from luthier.store.runs import refuse_busy

    folder = run_named(run)
    if not dry_run:
        refuse_busy(folder.folder)
    with uncollected():
        from luthier.recipes.finetune import resume as go_on
        from luthier.recipes.schemas.names import AI_FEEDBACK, SEVERAL
        from luthier.recipes.several.several import resume_several

    if dry_run:
        status = folder.status()
        found = {"run": str(folder.folder), "state": status.state, **(status.values or {})}
        print_json(found) if json else typer.echo(f"{run} {_prospect(status.state, folder.checkpoints.steps())}")
        return
    if folder.read_recipe().get("recipe") == SEVERAL:
        with progress(quiet=quiet) as recorder:
            several = resume_several(folder, recorder=recorder, accept_drift=accept_drift)
        print_json(several.line()) if json else print_several(several.summary)
        return
    if folder.read_recipe().get("recipe") == AI_FEEDBACK:
        with uncollected():
            from luthier.recipes.feedback.ai_feedback import resume_feedback

        with progress(quiet=quiet) as recorder:
            judged = resume_feedback(folder, recorder=recorder)
        print_json(judged.line()) if json else print_feedback(judged.summary)
        return
    with progress(quiet=quiet) as recorder:
        result = go_on(folder, recorder=recorder, accept_drift=accept_drift)
    print_json(result.line()) if json else print_summary(result.summary)


def _prospect(state: str, steps: list[int]) -> str:
    """What resuming a run would do."""
    if state == "finished":
        return "is finished; there is nothing to go on with"
    if state == "running":
        return "is at work in another process; it could not be resumed"
    if not steps:
        return f"is {state} and has no checkpoint; it would begin again with step 1"
    return f"is {state}; it would go on from its newest checkpoint that verifies, at best after step {steps[-1]}"
