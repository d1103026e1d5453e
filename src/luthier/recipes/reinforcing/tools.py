"""What the rewards of a run may use: a judge, a reward model and a sandbox, each opened where a reward needs it.

A judge and a reward model are named as any model is: a run, a folder, a hub id. They are read once for a process, on
the device of the run, and nothing of them is trained. A judge may be an engine behind HTTP as well.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from luthier.core.errors import RecipeError
from luthier.core.waiting import Waits
from luthier.infer.engine import Engine
from luthier.infer.patience import Patience
from luthier.infer.remote_text import RemoteTextModel
from luthier.infer.wire import Wire
from luthier.model.files.configs import config_of
from luthier.model.load import Precision
from luthier.model.scorer import TextModel
from luthier.model.tasks import SCORES
from luthier.model.text_model import LocalTextModel, LocalTextScorer
from luthier.recipes.opening.opened import open_named
from luthier.recipes.opening.results import result_of
from luthier.recipes.schemas.reinforce import ReinforceRecipe
from luthier.rewards import Tools
from luthier.store.runs import RunDirectory, is_run
from luthier.train.scoring import Scoring, with_sandbox

TOKEN: Final = "LUTHIER_ENGINE_TOKEN"
"""The variable with the token of an engine behind HTTP, where it wants one."""
PATIENCE: Final = 120.0
"""Seconds for which a judge behind HTTP that is away or has too much to do is asked again."""
_REMOTE: Final = ("http://", "https://")


def scoring_of(recipe: ReinforceRecipe) -> Scoring | None:
    """The reward of a recipe with its tools; None without one. Raises RecipeError where it needs what there is not."""
    if recipe.reward is None:
        return None
    needs, judge, scorer = recipe.reward.needs, None, None
    # A name that lacks is told by the driver, which knows the reward that wanted it.
    if "judge" in needs and recipe.judge is not None:
        judge = judge_named(recipe.judge, precision=recipe.precision, device=recipe.device)
    if "reward-model" in needs and recipe.reward_model is not None:
        scorer = _scorer_named(recipe.reward_model, recipe)
    tools = Tools(judge=judge, reward_model=scorer, seed=recipe.seed)
    return Scoring(recipe.reward, with_sandbox(recipe.reward, tools))


def judge_named(name: str, *, precision: Precision = "auto", device: str = "auto") -> TextModel:
    """The model that judges, opened. Raises RecipeError for one that says no text."""
    if name.startswith(_REMOTE):
        url, _, model = name.partition("#")
        wire = Wire(url, token=os.environ.get(TOKEN, ""))
        return RemoteTextModel(wire, model, patience=Patience(PATIENCE, waits=Waits(f"the judge at {wire.shown}")))
    opened = open_named(name, precision=precision, device=device)
    if not opened.model.task.speaks:
        raise RecipeError(f"judge is {name!r}, a {opened.model.task.name} model", allowed="a model that says text")
    return LocalTextModel(opened.model, Engine(opened.model), opened.renderer)


def models_here(scoring: Scoring) -> bool:
    """Whether a model in this process has a say in what answers are worth."""
    tools = scoring.tools
    return tools.reward_model is not None or not isinstance(tools.judge, RemoteTextModel | None)


def waits_of(judge: TextModel | None) -> list[Waits]:
    """How a judge is waited for that is asked over HTTP."""
    return [judge.patience.waits] if isinstance(judge, RemoteTextModel) else []


def require_judge(name: str) -> None:
    """Raise what is wrong with the name of a judge, without opening it; an engine is asked which models it has."""
    if name.startswith(_REMOTE):
        url, _, model = name.partition("#")
        RemoteTextModel(Wire(url, token=os.environ.get(TOKEN, "")), model).require()
    elif is_run(Path(name)):
        result_of(RunDirectory.open(Path(name)))
    else:
        config_of(name)


def _scorer_named(name: str, recipe: ReinforceRecipe) -> LocalTextScorer:
    opened = open_named(name, precision=recipe.precision, device=recipe.device)
    if opened.model.task != SCORES:
        raise RecipeError(
            f"reward_model is {name!r}, a {opened.model.task.name} model that was not trained to score answers",
            allowed="a run with objective reward_model",
        )
    return LocalTextScorer(opened.model, opened.renderer)
