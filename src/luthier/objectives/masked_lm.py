"""Masked language modelling: an encoder fills in tokens that were hidden from it.

Idea: of each text some tokens are chosen; most of these are replaced by the mask token, some by a random one, the rest
stay, so that the model cannot tell which of the tokens it sees are true. It predicts all chosen ones from both sides.
Which are chosen is drawn anew in every epoch, and is the same for the same row and epoch.
Equation: L = -sum_{t chosen} log p(x_t | x~) / number chosen, x~ the text with the chosen tokens replaced.
Source: Devlin et al., arXiv 1810.04805, section 3.1 and A.1; drawn anew: Liu et al., arXiv 1907.11692, section 4.1.
Cost: one forward and backward pass; the head is evaluated on the chosen tokens only, 15 % of all.
Use when: an encoder shall learn the language of a domain before it is tuned to classify there.
Not when: the model is a decoder (language_model), or there are labels enough to train on them at once.
"""

from __future__ import annotations

import zlib
from typing import Self, final

import numpy as np
from pydantic import Field, model_validator

from luthier.core.errors import RecipeError
from luthier.data.conversation import Meaning
from luthier.data.forest import Forest, Segment, Tree
from luthier.data.rendering.rendered import Rendered
from luthier.model.running.outputs import LossReport, TokenOutputs
from luthier.model.tasks import Task
from luthier.objectives import Objective, Vocabulary


@final
class MaskedLM(Objective):
    """Cross-entropy on tokens that were hidden."""

    rate: float = Field(0.15, gt=0, lt=1, description="share of the tokens that are chosen to be predicted")
    masked: float = Field(0.8, ge=0, le=1, description="share of the chosen tokens that become the mask token")
    random: float = Field(0.1, ge=0, le=1, description="share of the chosen tokens that become a random token")
    mask_token: int | None = Field(None, ge=0, description="id of the mask token; empty takes the tokenizer's")
    random_tokens: int | None = Field(None, ge=1, description="random tokens are ids below this; empty takes them all")

    @model_validator(mode="after")
    def _shares(self) -> MaskedLM:
        if self.masked + self.random > 1:
            raise RecipeError(f"masked and random are {self.masked} and {self.random}", allowed="1 together at most")
        return self

    @property
    def meanings(self) -> tuple[Meaning, ...] | None:
        return ("text",)

    def task(self, classes: tuple[str, ...]) -> Task:
        return Task("masked_lm")

    def with_vocabulary(self, vocabulary: Vocabulary) -> Self:
        mask = vocabulary.mask_id if self.mask_token is None else self.mask_token
        if mask is None or mask >= vocabulary.size:
            raise RecipeError(
                f"the mask token is {mask}", allowed=f"a token of the tokenizer, 0 to {vocabulary.size - 1}",
                do="set objective.mask_token, or choose a model whose tokenizer has a mask token",
            )  # fmt: skip
        below = vocabulary.size if self.random_tokens is None else self.random_tokens
        return self.model_copy(update={"mask_token": mask, "random_tokens": below})

    def trees(self, view: Rendered, *, epoch: int = 0) -> list[Tree]:
        if self.mask_token is None or self.random_tokens is None:
            raise RecipeError(
                f"masked_lm does not know its mask token: {self.mask_token}", allowed="an id", do="call with_vocabulary"
            )
        # By its tokens too: the windows of one text share its row.
        draw = np.random.default_rng([epoch, view.row, zlib.crc32(view.tokens.tobytes())])
        may = np.flatnonzero(view.weights)
        chosen = may[draw.random(len(may)) < self.rate]
        if len(chosen) == 0 and len(may):
            chosen = may[draw.integers(len(may), size=1)]
        fate = draw.random(len(chosen))
        tokens = view.tokens.copy()
        tokens[chosen[fate < self.masked]] = self.mask_token
        swapped = chosen[(fate >= self.masked) & (fate < self.masked + self.random)]
        tokens[swapped] = draw.integers(self.random_tokens, size=len(swapped))
        weights = np.zeros_like(view.weights)
        weights[chosen] = view.weights[chosen]
        segment = Segment(tokens, weights, labels=view.tokens, types=view.types)
        return [Tree((segment,), row=view.row)]

    def loss(self, outputs: TokenOutputs, forest: Forest) -> LossReport:
        return LossReport(-(outputs.weights * outputs.log_probs).sum(), forest.weight)
