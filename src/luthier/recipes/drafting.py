"""A second, smaller model that goes ahead of one that speaks."""

from __future__ import annotations

from dataclasses import replace

from luthier.core.errors import RecipeError
from luthier.infer.draft_model import DraftModel
from luthier.model.load import Precision
from luthier.recipes.opening.opened import Opened, open_named


def with_draft_model(opened: Opened, name: str, *, precision: Precision = "auto") -> Opened:
    """The same, with drafts by the model that `name` stands for. Raises RecipeError for one of another vocabulary."""
    other = open_named(name, precision=precision, speaks=True)
    differing = opened.tokenizer.differing(other.tokenizer)
    if differing:
        raise RecipeError(
            f"the draft model {name} has another vocabulary than {opened.model.source}: {len(differing):,} tokens are "
            f"others or stand elsewhere, such as {', '.join(map(repr, differing[:3]))}",
            allowed="a model with the same vocabulary, such as a smaller one of the same family",
            do="leave --draft-model out; --drafts alone drafts by what the text has said",
        )
    return replace(opened, drafting=DraftModel(other.model, vocabulary=opened.model.vocabulary_size))
