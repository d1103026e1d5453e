"""What the rewards of a run may use: a judge, a reward model and a sandbox, each opened where a reward needs it.

A judge and a reward model are named as any model is: a run, a folder, a hub id. They are read once for a process, on
the device of the run, and nothing of them is trained.
"""

from __future__ import annotations

from luthier.infer.engine import Engine
from luthier.model.text_model import LocalTextModel, LocalTextScorer
from luthier.recipes.opened import Opened, open_named
from luthier.recipes.reinforce_recipe import ReinforceRecipe
from luthier.rewards import Tools
from luthier.train.scoring import Scoring, with_sandbox


def scoring_of(recipe: ReinforceRecipe) -> Scoring | None:
    """The reward of a recipe with its tools; None without one. Raises RecipeError where it needs what there is not."""
    if recipe.reward is None:
        return None
    needs = recipe.reward.needs
    judge = _opened(recipe.judge, recipe) if "judge" in needs else None
    model = _opened(recipe.reward_model, recipe) if "reward-model" in needs else None
    tools = Tools(
        judge=None if judge is None else LocalTextModel(judge.model, Engine(judge.model), judge.renderer),
        reward_model=None if model is None else LocalTextScorer(model.model, model.renderer),
        seed=recipe.seed,
    )
    return Scoring(recipe.reward, with_sandbox(recipe.reward, tools))


def _opened(name: str | None, recipe: ReinforceRecipe) -> Opened | None:
    # None is told by the driver, which knows the reward that wanted it.
    return None if name is None else open_named(name, precision=recipe.precision, device=recipe.device)
