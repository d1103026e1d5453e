"""`luthier compare`: several methods on one data file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

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
    search: Annotated[
        int, typer.Option("--search", metavar="N", help="Learning rates that are tried for each method, at least.")
    ] = 1,
    search_share: Annotated[
        float, typer.Option(metavar="X", help="Share of the budget that each of them gets.")
    ] = 0.25,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train several methods on the same data with the same budget, and compare what comes out.

    \b
    Examples:
      luthier compare --model seedling --data rows.jsonl --methods lora,ia3,in_context
      luthier compare --model Qwen/Qwen2.5-0.5B --data rows.jsonl --metric exact_match --search 3 --run runs/compared
    """
    with uncollected():
        from luthier.core.knobs import validate
        from luthier.core.yaml_text import parse_value
        from luthier.recipes.comparing.compare import Measures, require_methods
        from luthier.recipes.comparing.compare import compare as compare_methods

    names = require_methods(methods)
    values = {"questions": questions, "max_new_tokens": max_new_tokens, "examples": examples, "keep": keep,
              "search": search, "search_share": search_share}  # fmt: skip
    measures = validate(Measures, {"metric": parse_value(metric, name="--metric"), **values})
    with progress(quiet=quiet) as recorder:
        found = compare_methods(
            model, data, names, folder=run, sets=set_ or [], measures=measures, recorder=recorder
        )
    print_json(found) if json else _print(found, run)
    if any("error" in one for one in found["methods"]):
        raise typer.Exit(1)


def _print(found: Mapping[str, Any], run: Path) -> None:
    """The table, with columns as wide as they need to be, and where the page is."""
    from luthier.store.comparison import PAGE, heads, table

    rows = [list(heads(found)), *table(found)]
    whole = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(map(len, column)) for column in zip(*whole, strict=True)]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip())
    typer.echo(f"page    {run / PAGE}")
