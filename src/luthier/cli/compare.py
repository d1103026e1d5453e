"""`luthier compare`: several methods on one data file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.options import Json, Quiet, Set
from luthier.cli.show import print_json
from luthier.core.imports import uncollected
from luthier.core.paths import RUNS
from luthier.core.yaml_text import parse_value
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
        str, typer.Option("--keep", metavar="FILE", help="Text whose loss tells what was forgotten.")
    ] = "",
    examples: Annotated[
        int, typer.Option("--examples", metavar="N", help="Training rows before each question, for in_context.")
    ] = 4,
    metric: Annotated[
        str,
        typer.Option(
            "--metric", metavar="NAME", help="likelihood, or what judges generated answers: bleu, exact_match, ..."
        ),
    ] = "likelihood",
    questions: Annotated[
        int, typer.Option("--questions", metavar="N", help="Held-out prompts that are answered at most.")
    ] = 200,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Longest answer, in tokens.")] = 128,
    tries: Annotated[
        int, typer.Option("--search", metavar="N", help="Learning rates that are tried for each method.")
    ] = 1,
    try_share: Annotated[
        float, typer.Option("--search-share", metavar="X", help="Share of the budget that each of them gets.")
    ] = 0.25,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train several methods on the same data with the same budget, and compare what comes out.

    \b
    Examples:
      luthier compare --model seedling --data rows.jsonl --methods lora,ia3,in_context
      luthier compare --model seedling --data rows.jsonl --metric exact_match --search 3
      luthier compare --model Qwen/Qwen2.5-0.5B --data rows.jsonl --set budget.epochs=1 --run runs/compared
    """
    with uncollected():
        from luthier.core.knobs import validate
        from luthier.recipes.compare import Measures, require_methods
        from luthier.recipes.compare import compare as compare_methods
        from luthier.store.comparison import PAGE, heads, table

    names = require_methods(methods)
    values = {"questions": questions, "max_new_tokens": max_new_tokens, "examples": examples, "keep": keep,
              "tries": tries, "try_share": try_share}  # fmt: skip
    measures = validate(Measures, {"metric": parse_value(metric, name="--metric"), **values})
    with progress(quiet=quiet) as recorder:
        found = compare_methods(
            model, data, names, folder=run, sets=set_ or [], measures=measures, recorder=recorder
        )
    failed = [one["method"] for one in found["methods"] if "error" in one]
    if json:
        print_json(found)
    else:
        rows = [list(heads(found)), *table(found)]
        whole = [row for row in rows if len(row) == len(heads(found))]
        widths = [max(map(len, column)) for column in zip(*whole, strict=True)]
        for row in rows:
            typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip())
        typer.echo(f"page    {run / PAGE}")
    if failed:
        raise typer.Exit(1)
