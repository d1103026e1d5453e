"""`luthier compare`: several methods on one data file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.options import Json, Quiet, Set
from luthier.cli.show import print_json
from luthier.core.imports import uncollected
from luthier.core.paths import RUNS
from luthier.recipes.progress import progress

ALL = "full,lora,ia3,bottleneck,prompt_tuning,prefix_tuning,p_tuning_v2,galore,qlora,in_context"


def compare(
    model: Annotated[str, typer.Option("--model", metavar="MODEL", help="Base model: hub id, folder, or seedling.")],
    data: Annotated[str, typer.Option("--data", metavar="FILE", help="Data file; some of its rows are held out.")],
    methods: Annotated[str, typer.Option("--methods", metavar="A,B,...", help="Methods, with commas.")] = ALL,
    set_: Set = None,
    run: Annotated[Path, typer.Option("--run", metavar="DIR", help="New folder for runs and tables.")] = Path(
        RUNS, "compare"
    ),
    keep: Annotated[
        Path | None, typer.Option("--keep", metavar="FILE", help="Text whose loss tells what was forgotten.")
    ] = None,
    examples: Annotated[
        int, typer.Option("--examples", min=0, help="Training rows before each question, for in_context.")
    ] = 4,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train several methods on the same data with the same budget, and compare what comes out.

    \b
    Examples:
      luthier compare --model seedling --data rows.jsonl --methods lora,ia3,in_context
      luthier compare --model Qwen/Qwen2.5-0.5B --data rows.jsonl --set budget.epochs=1 --run runs/compared
    """
    with uncollected():
        from luthier.recipes.compare import compare as compare_methods
        from luthier.recipes.compare import require_methods
        from luthier.store.comparison import HEADS, PAGE, table

    names = require_methods(methods)
    with progress(quiet=quiet) as recorder:
        found = compare_methods(
            model, data, names, folder=run, sets=set_ or [], keep=keep, examples=examples, recorder=recorder
        )
    failed = [one["method"] for one in found["methods"] if "error" in one]
    if json:
        print_json(found)
    else:
        rows = [list(HEADS), *table(found)]
        whole = [row for row in rows if len(row) == len(HEADS)]
        widths = [max(map(len, column)) for column in zip(*whole, strict=True)]
        for row in rows:
            typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip())
        typer.echo(f"page    {run / PAGE}")
    if failed:
        raise typer.Exit(1)
