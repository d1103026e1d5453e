"""What a recipe in plain values is a recipe of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from luthier.core.errors import RecipeError
from luthier.core.nearest import nearest
from luthier.core.recipe_file import Layered, read_layers
from luthier.recipes.schemas.ai_feedback import AiFeedbackRecipe
from luthier.recipes.schemas.finetune import FinetuneRecipe
from luthier.recipes.schemas.names import ADAPTATION, AI_FEEDBACK, FINETUNE, MERGE, MERGEKIT, REINFORCE, SEVERAL
from luthier.recipes.schemas.reinforce import ReinforceRecipe

KINDS: Mapping[object, type[FinetuneRecipe]] = {REINFORCE: ReinforceRecipe, AI_FEEDBACK: AiFeedbackRecipe}
_TRAIN: Final = (FINETUNE, *map(str, KINDS), SEVERAL, ADAPTATION)


def kind_of_recipe(values: Mapping[str, Any]) -> type[FinetuneRecipe]:
    """The class of a recipe; what names no story is a fine-tune."""
    return KINDS.get(values.get("recipe"), FinetuneRecipe)


def require_one_run(layered: Layered) -> None:
    """Raise RecipeError for a recipe that is none of a run that trains one adapter, before its keys are looked at."""
    values, where, file = layered.values, layered.address("recipe"), layered.file or "RECIPE"
    name = values.get("recipe", FINETUNE)
    if name == MERGE or MERGEKIT in values:
        raise RecipeError(
            "a recipe of a merge, which trains nothing", where=where,
            do=f"luthier merge {file} --dry-run tells what it would do, luthier merge {file} --out DIR does it",
        )  # fmt: skip
    if "adapters" in values or name == ADAPTATION:
        what = "several adapters" if "adapters" in values else "stages"
        raise RecipeError(f"a recipe of {what}, which is no single run", where=where, do=f"luthier train {file}")
    if name == SEVERAL:
        raise RecipeError(
            f"recipe: {name}, and no adapters", allowed="adapters: names, and below each what is its own", where=where
        )
    if name not in _TRAIN:
        close = nearest(str(name), (*_TRAIN, MERGE))
        raise RecipeError(
            f"recipe: {name!r:.80}", allowed=f"{', '.join(_TRAIN)}; and {MERGE}, for luthier merge",
            do=f"did you mean {' or '.join(close)}?" if close else "", where=where,
        )  # fmt: skip


def names_adaptation(path: Path) -> bool:
    """Whether a recipe file tells the story of a domain. What is wrong with it is told by those who read all of it."""
    try:
        return read_layers(path, known=("recipe",)).values.get("recipe") == ADAPTATION
    except RecipeError:
        return False
