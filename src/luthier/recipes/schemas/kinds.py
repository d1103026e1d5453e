"""What a recipe in plain values is a recipe of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.recipes.schemas.ai_feedback import AI_FEEDBACK, AiFeedbackRecipe
from luthier.recipes.schemas.finetune import FinetuneRecipe
from luthier.recipes.schemas.reinforce import REINFORCE, ReinforceRecipe

KINDS: Mapping[object, type[FinetuneRecipe]] = {REINFORCE: ReinforceRecipe, AI_FEEDBACK: AiFeedbackRecipe}


def kind_of_recipe(values: Mapping[str, Any]) -> type[FinetuneRecipe]:
    """The class of a recipe; what names no story is a fine-tune."""
    return KINDS.get(values.get("recipe"), FinetuneRecipe)
