"""`luthier train` with a recipe of domain adaptation: what is done, and what it was worth."""

from __future__ import annotations

from pathlib import Path

import typer

from luthier.cli.show import print_json
from luthier.core.imports import uncollected
from luthier.recipes.progress import progress


def train_adaptation(
    path: Path, sets: list[str], run: Path | None, *, dry_run: bool, json: bool, quiet: bool
) -> None:
    """Run all stages of a recipe, or tell them."""
    with uncollected():
        from luthier.recipes.domain_adaptation import adapt, load_adaptation, stage_recipes

    recipe = load_adaptation(path, overrides=sets, run=run)
    if dry_run:
        stages = [each.model_dump(mode="json") for each in stage_recipes(recipe)]
        whole = {"recipe": recipe.model_dump(mode="json"), "stages": stages}
        if json:
            print_json(whole)
            return
        for stage, told in zip(recipe.stages, stages, strict=True):
            what = f"{told['objective']['method']} on {told['data']['train']}"
            typer.echo(f"stage      {stage.name}: {what}, in {told['run']}")
        typer.echo(f"merge      {recipe.merge.method_name()} with {recipe.instruct or recipe.model}")
        return
    with progress(quiet=quiet) as recorder:
        found = adapt(recipe, recorder=recorder)
    if json:
        print_json(found)
        return
    for name, score in found["scores"].items():
        typer.echo(f"{name:10} {found['measure']} {score:.4f}")
    merged = found["merged"]
    typer.echo(f"merged     {found['measure']} {merged['merged']:.4f}  (expected of the mean {merged['expected']:.4f}, "
               f"improvement over the best {merged['improvement']:+.4f}), {merged['folder']}")  # fmt: skip
