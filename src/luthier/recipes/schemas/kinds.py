"""What a recipe in plain values is a recipe of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.core.errors import RecipeError
from luthier.core.recipe_file import read_layers
from luthier.recipes.schemas.ai_feedback import AiFeedbackRecipe
from luthier.recipes.schemas.finetune import FinetuneRecipe
from luthier.recipes.schemas.names import ADAPTATION, AI_FEEDBACK, REINFORCE
from luthier.recipes.schemas.reinforce import ReinforceRecipe

KINDS: Mapping[object, type[FinetuneRecipe]] = {REINFORCE: ReinforceRecipe, AI_FEEDBACK: AiFeedbackRecipe}


def kind_of_recipe(values: Mapping[str, Any]) -> type[FinetuneRecipe]:
    """The class of a recipe; what names no story is a fine-tune."""
    return KINDS.get(values.get("recipe"), FinetuneRecipe)


def names_adaptation(path: Path) -> bool:
    """Whether a recipe file tells the story of a domain. What is wrong with it is told by those who read all of it."""
    try:
        return read_layers(path, known=("recipe",)).values.get("recipe") == ADAPTATION
    except RecipeError:
        return False
