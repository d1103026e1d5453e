"""Seq2seq: an encoder-decoder learns to answer a text with another.

Idea: the encoder reads the prompt, and the decoder is raised to say the answer, token by token, given all of it.
Equation: L = -sum_t w_t log p(y_t | y_{<t}, x) / sum_t w_t, over the trained tokens of the optimizer step.
Source: Raffel et al., arXiv 1910.10683, section 2.4.
Cost: one forward and backward pass of the encoder over prompts and of the decoder over answers; the head is evaluated
    on answers only.
Use when: the model is T5-like, and there are good answers to imitate: translation, summaries, texts from data.
Not when: the model is a decoder (sft); or the answers are a few fixed choices (t_few).
"""

from __future__ import annotations

from typing import final

from luthier.core.errors import DataError
from luthier.data.answers import text_and_answers
from luthier.data.forest import Forest, Segment, Tree
from luthier.data.rendering.rendered import Rendered
from luthier.model.running.outputs import LossReport, TokenOutputs
from luthier.model.tasks import Task
from luthier.objectives import Objective


@final
class Seq2Seq(Objective):
    """Cross-entropy on the answers of an encoder-decoder."""

    def task(self, classes: tuple[str, ...]) -> Task:
        return Task("seq2seq_lm")

    def trees(self, view: Rendered, *, epoch: int = 0) -> list[Tree]:
        read, answers = text_and_answers(view)
        said = []
        for answer in answers:
            weights = answer.weights.copy()
            weights[0] = 0  # the start token is given
            if answer.right and weights.any():
                said.append(Segment(answer.tokens, weights, 0))
        if not said:
            raise DataError(f"row {view.row} has no trained token", do="look at it with: luthier data show")
        return [Tree((read, *said), row=view.row)]

    def loss(self, outputs: TokenOutputs, forest: Forest) -> LossReport:
        return LossReport(-(outputs.weights * outputs.log_probs).sum(), forest.weight)
