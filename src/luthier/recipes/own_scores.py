"""How likely given texts are for a model that is loaded here: what the numbers of another engine are held against."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

from luthier.data.forest import Ints, Segment, Tree, pack
from luthier.infer.sync import Score
from luthier.model.language_model import LanguageModel

_AT_ONCE = 4096
"""Tokens that go through the model together."""


def scores_by(model: LanguageModel, *, bare: bool = False, temperature: float = 1.0) -> Score:
    """Log-probabilities by a model as it is when it is asked, `bare` without what is attached to it."""

    @torch.no_grad()
    def score(texts: Sequence[Ints]) -> list[list[float]]:
        trees = [Tree((Segment(text, np.ones(len(text), np.float32)),)) for text in texts]
        without: AbstractContextManager[None] = model.without_attachments() if bare else nullcontext()
        training = model.module.training
        model.train(False)
        told: list[float] = []
        try:
            with without:
                for forest in pack(trees, max_tokens=_AT_ONCE):
                    told += model.token_outputs(forest, temperature=temperature).log_probs.tolist()
        finally:
            model.train(training)
        ends = np.cumsum([len(text) - 1 for text in texts])
        return [told[end - len(text) + 1 : end] for text, end in zip(texts, ends.tolist(), strict=True)]

    return score
