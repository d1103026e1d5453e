"""Where the paths of a run lead: relative ones start at the folder in which the run was started.

A run and its result keep paths as they were written, so that they read the same wherever the run lies. What opens them
later, perhaps from elsewhere, asks here. A path that leads nowhere from the first folder is taken from the present one.
"""

from __future__ import annotations

import glob
from pathlib import Path

from luthier.core.errors import DataError
from luthier.data.reading.rows import find_sources
from luthier.recipes.opening.results import model_from, template_from
from luthier.recipes.schemas.ai_feedback import AiFeedbackRecipe
from luthier.recipes.schemas.finetune import FinetuneRecipe, Paths
from luthier.recipes.schemas.reinforce import ReinforceRecipe, RolloutKnobs


def located(recipe: FinetuneRecipe, folder: Path | None) -> FinetuneRecipe:
    """`recipe` with paths that lead from here where they led from `folder`; `recipe` itself when that is here."""
    if folder is None or folder == Path.cwd():
        return recipe
    data = {
        "train": _data(recipe.data.train, folder),
        "evaluation": None if recipe.data.evaluation is None else _data(recipe.data.evaluation, folder),
        "template": template_from(recipe.data.template, folder),
    }
    models = {"model": recipe.model}
    asked: dict[str, str | None] = {}
    if isinstance(recipe, ReinforceRecipe):
        asked = {"judge": recipe.judge, "reward_model": recipe.reward_model}
    if isinstance(recipe, AiFeedbackRecipe):
        asked = {"judge": recipe.judge, "speaker": recipe.speaker}
    if isinstance(recipe, ReinforceRecipe | AiFeedbackRecipe):
        recipe = recipe.model_copy(update={"rollouts": _rollouts(recipe.rollouts, folder)})
    models |= {key: name for key, name in asked.items() if name is not None}
    there = {key: model_from(name, folder) for key, name in models.items()}
    teacher = None if recipe.reference.model is None else model_from(recipe.reference.model, folder)
    reference = recipe.reference.model_copy(update={"model": teacher})
    return recipe.model_copy(update={**there, "reference": reference, "data": recipe.data.model_copy(update=data)})


def _rollouts(knobs: RolloutKnobs, folder: Path) -> RolloutKnobs:
    if not knobs.engine.adapters:
        return knobs
    there = knobs.engine.model_copy(update={"adapters": str(folder / knobs.engine.adapters)})
    return knobs.model_copy(update={"engine": there})


def _data(paths: Paths, folder: Path) -> Paths:
    return _file(paths, folder) if isinstance(paths, str) else tuple(_file(path, folder) for path in paths)


def _file(text: str, folder: Path) -> str:
    pattern = any(char in text for char in "*?[") and not (folder / text).exists()
    there = str(Path(glob.escape(str(folder)) if pattern else folder, text))
    # What is nowhere is named with the folder it is missing from.
    return text if not _leads(there) and _leads(text) else there


def _leads(text: str) -> bool:
    try:
        return bool(find_sources(text))
    except DataError:
        return False
