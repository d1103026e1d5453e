"""`luthier demo`: a real before and after, in a minute or two."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from luthier.cli.options import DryRun, Json, Quiet
from luthier.cli.show import console_of, print_json
from luthier.core.imports import uncollected
from luthier.core.units import duration_text
from luthier.recipes.progress import progress

if TYPE_CHECKING:
    from rich.console import Console

    from luthier.recipes.demo import DemoResult


def demo(
    run: Annotated[Path | None, typer.Option("--run", metavar="DIR", help="Run directory.")] = None,
    json: Json = False,
    quiet: Quiet = False,
    dry_run: DryRun = False,
) -> None:
    """Teach the seedling, a toy model that ships with luthier, to write strict JSON, and show the difference.

    \b
    Examples:
      luthier demo
      luthier demo --json --run runs/demo
    """
    with uncollected():
        from luthier.recipes.demo import demo as run_demo
        from luthier.recipes.demo import recipe_of

    if dry_run:
        print_json(recipe_of(run, Path("rows.jsonl")).model_dump(mode="json", exclude_none=True))
        return
    with progress(quiet=quiet) as recorder:
        found = run_demo(run, recorder=recorder)
    print_json(found.line()) if json else show(found, console_of(), where=Path(found.summary["run"]))


def show(found: DemoResult, console: Console, *, where: Path) -> None:
    """Print what the demo found; `where` is the run directory that is named."""
    from rich.table import Table
    from rich.text import Text

    title = "a sentence becomes strict JSON (held-out rows, unseen names)"
    table = Table(title=title, title_justify="left", show_lines=True)
    for name in ("sentence", "before", "after"):
        table.add_column(name, ratio=1, overflow="fold")
    for example in found.examples:
        right = "green" if example["after"] == example["reference"] else "red"
        before, after = example["before"] or "(nothing)", example["after"] or "(nothing)"
        table.add_row(Text(example["prompt"]), Text(before), Text(after, style=right))
    console.print(table, soft_wrap=False)
    console.print(f"exact match      {100 * found.before:.0f} % -> {100 * found.after:.0f} % of 100 held-out rows")
    forgetting = found.forgetting
    console.print(
        f"forgetting       loss on base text {forgetting['before']:.3f} -> {forgetting['after']:.3f} "
        "(it predicts the base's own text worse than before)"
        if forgetting["after"] > forgetting["before"]
        else f"forgetting       none: loss on base text {forgetting['before']:.3f} -> {forgetting['after']:.3f}"
    )
    console.print(f"training         {duration_text(found.summary['train_seconds'])}, {found.summary['steps']} steps")
    console.print(f"report           {where}/report.html")
    console.print("\nThe seedling is a toy of three million parameters. With a real model and your own file:")
    console.print("  luthier init mine.yaml --model Qwen/Qwen2.5-0.5B-Instruct --data my_rows.jsonl")
    console.print("  luthier train mine.yaml")
