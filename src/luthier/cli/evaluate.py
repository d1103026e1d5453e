"""`luthier eval`: the held-out loss of a run's result, computed anew."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.options import Json, Run, run_named
from luthier.cli.show import print_json


def evaluate(
    run: Run,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="FILE", help="Another data file; empty takes the held-out rows.")
    ] = None,
    json: Json = False,
) -> None:
    """Loss of base and tuned model on held-out rows, from the files of the run.

    \b
    Examples:
      luthier eval runs/2026-11-20-my-first
      luthier eval runs/2026-11-20-my-first --data other_rows.jsonl --json
    """
    from luthier.recipes.evaluate import evaluate_run

    found = evaluate_run(run_named(run), data=data)
    if json:
        print_json(found)
        return
    typer.echo(f"rows {found['rows']}, trained tokens {found['trained_tokens']}")
    typer.echo(f"base  loss {found['base']['loss']:.4f}  perplexity {found['base']['perplexity']:.3f}")
    typer.echo(f"tuned loss {found['tuned']['loss']:.4f}  perplexity {found['tuned']['perplexity']:.3f}")
