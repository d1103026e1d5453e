"""The teacher of a recipe: whose word the objective asks for, and what it reads that the student does not.

A teacher is named as any model is: a run, a folder, a hub id; without a name it is the base model itself. It reads the
very tokens of the student, so both must have the same vocabulary. A prompt stands in front as the chat template puts a
system message there: found out once, as what conversations begin with that have one, and those that have none.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from luthier.core.errors import RecipeError
from luthier.data.conversation import Message
from luthier.data.forest import Ints
from luthier.data.prepare import Prepared
from luthier.data.rendering.renderer import Renderer
from luthier.data.tokenizer import Tokenizer
from luthier.model.language_model import LanguageModel
from luthier.recipes.opening.opened import open_named
from luthier.recipes.schemas.finetune import FinetuneRecipe
from luthier.train.reference import Front, Reference

TEXTS: Final = ("x", "Why is that?")
"""What is said in two conversations that are compared: nothing of one is in the other."""


def reference_of(recipe: FinetuneRecipe, data: Prepared, *, base: LanguageModel | None = None) -> Reference:
    """Whose word the objective of a recipe, whose paths lead from here, asks for.

    `base` is given where the trained model has no adapter that could be switched off. Raises RecipeError for a teacher
    of another vocabulary.
    """
    model, teacher = base, recipe.reference.model
    if teacher is not None:
        opened = open_named(teacher, precision=recipe.precision, device=recipe.device)
        require_same_tokens(teacher, opened.tokenizer, recipe.model, data.renderer.tokenizer)
        model = opened.model
    front = front_of(data.renderer, recipe.reference.prompt) if recipe.reference.prompt else None
    return Reference(model, front)


def require_same_tokens(teacher: str, one: Tokenizer, student: str, other: Tokenizer) -> None:
    """Raise RecipeError unless each token of the student is the same token of the teacher."""
    differing = one.differing(other)
    if not differing:
        return
    raise RecipeError(
        f"the teacher {teacher} has {len(one.vocabulary):,} tokens and {student} "
        f"{len(other.vocabulary):,}; {len(differing):,} of them are others or stand elsewhere, such as "
        f"{', '.join(map(repr, differing[:3]))}",
        allowed="a teacher with the student's vocabulary, such as a larger model of its family",
        do="let the teacher answer the prompts, and train sft on its answers",
    )


def front_of(renderer: Renderer, prompt: str) -> Front:
    """What conversations begin with when their system message is `prompt`, in the place of what they begin with else.

    Raises RecipeError for a template that writes what follows otherwise too.
    """
    without, whole = ([_rendered(renderer, system, text) for text in TEXTS] for system in ("", prompt))
    removed, put = _shared(*without), _shared(*whole)
    if any(not np.array_equal(one[len(removed) :], two[len(put) :]) for one, two in zip(without, whole, strict=True)):
        raise RecipeError(
            f"reference.prompt is {prompt!r}, and the chat template does not put a system message in front of a "
            "conversation and leave the rest as it is",
            do="leave reference.prompt out, or choose another data.template",
        )
    return Front(removed, put)


def _rendered(renderer: Renderer, system: str, text: str) -> Ints:
    return renderer.prompt_ids([*([Message("system", system)] if system else []), Message("user", text)])


def _shared(one: Ints, two: Ints) -> Ints:
    """The tokens with which both begin."""
    count = min(len(one), len(two))
    same = one[:count] == two[:count]
    return one[: count if same.all() else int(np.argmin(same))]
