"""`luthier train`: run a recipe."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from luthier.cli.adapt import train_adaptation
from luthier.cli.options import DryRun, Json, Quiet, Set
from luthier.cli.show import print_json, print_plan, print_summary
from luthier.cli.show_feedback import print_feedback, print_feedback_plan
from luthier.cli.show_several import print_several, print_several_plans
from luthier.core.errors import RecipeError
from luthier.core.imports import uncollected
from luthier.recipes.progress import progress

if TYPE_CHECKING:
    from luthier.recipes.schemas.ai_feedback import AiFeedbackRecipe
    from luthier.recipes.schemas.files import LoadedRecipe


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="Recipe file.", show_default=False)],
    set_: Set = None,
    run: Annotated[Path | None, typer.Option("--run", metavar="DIR", help="Run directory.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Move a run that is there aside first.")] = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune a model as a recipe says. The same command again goes on with a run that was interrupted.

    A recipe with `adapters` trains several of them at once, each on its own data, over one base.

    \b
    Examples:
      luthier train recipe.yaml
      luthier train recipe.yaml --set adapter.rank=32 --set data.train=rows.jsonl --run runs/mine
    """
    if not dry_run:
        _refuse_busy(recipe, set_ or [], run)
    with uncollected():
        from luthier.recipes.bench import lay_out
        from luthier.recipes.finetune import start
        from luthier.recipes.schemas.ai_feedback import AiFeedbackRecipe
        from luthier.recipes.schemas.files import load_recipe, place_of
        from luthier.recipes.schemas.kinds import names_adaptation
        from luthier.recipes.schemas.several import names_several
        from luthier.store.runs import RunDirectory

    if names_adaptation(recipe):
        train_adaptation(recipe, set_ or [], run, dry_run=dry_run, json=json, quiet=quiet)
        return
    if names_several(recipe, set_ or []):
        _train_several(recipe, set_ or [], run, overwrite=overwrite, dry_run=dry_run, json=json, quiet=quiet)
        return
    loaded = load_recipe(recipe, overrides=set_ or [], run=run)
    if isinstance(loaded.recipe, AiFeedbackRecipe):
        _train_on_feedback(loaded, loaded.recipe, overwrite=overwrite, dry_run=dry_run, json=json, quiet=quiet)
        return
    if dry_run:
        RunDirectory.require_folder(place_of(loaded.recipe))
        plan = lay_out(loaded.recipe).plan
        origins = [{"key": key, "value": value, "origin": origin} for key, value, origin in loaded.origins]
        print_json({"recipe": origins, "plan": plan}) if json else print_plan(loaded.origins, plan)
        return
    with progress(quiet=quiet, notices=loaded.notices) as recorder:
        result = start(loaded.recipe, recorder=recorder, overwrite=overwrite)
    print_json(result.line()) if json else print_summary(result.summary)


def _train_several(
    recipe: Path, sets: list[str], run: Path | None, *, overwrite: bool, dry_run: bool, json: bool, quiet: bool
) -> None:
    """A recipe that names several adapters."""
    with uncollected():
        from luthier.recipes.schemas.several import load_several_recipe
        from luthier.recipes.several.several import lay_out_several, start_several

    loaded = load_several_recipe(recipe, overrides=sets, run=run)
    if dry_run:
        plans = {name: bench.plan for name, bench in lay_out_several(loaded).items()}
        written = loaded.as_written()
        print_json({"recipe": written, "plan": plans}) if json else print_several_plans(written, plans)
        return
    with progress(quiet=quiet, notices=loaded.notices) as recorder:
        result = start_several(loaded, recorder=recorder, overwrite=overwrite)
    print_json(result.line()) if json else print_several(result.summary)


def _train_on_feedback(
    loaded: LoadedRecipe, recipe: AiFeedbackRecipe, *, overwrite: bool, dry_run: bool, json: bool, quiet: bool
) -> None:
    """A recipe that names a judge of the model's own answers."""
    with uncollected():
        from luthier.recipes.feedback.ai_feedback import plan_feedback, start_feedback

    if dry_run:
        plan = plan_feedback(recipe)
        origins = [{"key": key, "value": value, "origin": origin} for key, value, origin in loaded.origins]
        print_json({"recipe": origins, "plan": plan}) if json else print_feedback_plan(loaded.origins, plan)
        return
    with progress(quiet=quiet, notices=loaded.notices) as recorder:
        result = start_feedback(recipe, recorder=recorder, overwrite=overwrite)
    print_json(result.line()) if json else print_feedback(result.summary)


def _refuse_busy(recipe: Path, sets: list[str], run: Path | None) -> None:
    """Before anything slow is imported: say at once when there is no recipe, or when another process is at work where
    this run would go."""
    from luthier.core.recipe_file import no_recipe, read_layers
    from luthier.store.runs import refuse_busy

    with suppress(OSError):
        # What else is wrong with the file is told by those who read it.
        if not recipe.exists():
            raise no_recipe(recipe)
    place: object = run
    if place is None:
        with suppress(RecipeError):
            # The same goes for what is wrong in it.
            place = read_layers(recipe, sets=[item for item in sets if item.startswith("run=")]).values.get("run")
    if isinstance(place, (str, Path)):
        refuse_busy(Path(place))
