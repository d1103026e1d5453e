"""`luthier train`: run a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.options import DryRun, Json, Quiet, Set
from luthier.cli.show import print_json, print_plan, print_summary
from luthier.recipes.progress import progress


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="Recipe file.", show_default=False)],
    set_: Set = None,
    run: Annotated[Path | None, typer.Option("--run", metavar="DIR", help="Run directory.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Move a run that is there aside first.")] = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune a model as a recipe says.

    \b
    Examples:
      luthier train recipe.yaml
      luthier train recipe.yaml --set adapter.rank=32 --set data.train=rows.jsonl --run runs/mine
    """
    from luthier.recipes.bench import lay_out
    from luthier.recipes.files import load_recipe
    from luthier.recipes.finetune import start

    loaded = load_recipe(recipe, overrides=set_ or [], run=run)
    if dry_run:
        plan = lay_out(loaded.recipe).plan
        origins = [{"key": key, "value": value, "origin": origin} for key, value, origin in loaded.origins]
        print_json({"recipe": origins, "plan": plan}) if json else print_plan(loaded.origins, plan)
        return
    with progress(quiet=quiet, notices=loaded.notices) as recorder:
        result = start(loaded.recipe, recorder=recorder, overwrite=overwrite)
    print_json(result.line()) if json else print_summary(result.summary)
