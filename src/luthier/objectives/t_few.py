"""T-Few: an encoder-decoder learns to choose among answers, from a few examples.

Idea: beside the right answer's likelihood, each token of the wrong answers is made less likely, and the answers compete
by their mean log-probability, which is how one of them is chosen later. All answers to a text share the encoder's work.
Equation: L = L_LM + u L_UL + l L_LN, for each row with right answer y and wrong answers y',
    L_LM = -mean_t log p(y_t), L_UL = -mean_t log(1 - p(y'_t)) over the tokens of all wrong ones,
    L_LN = -log [exp b(y) / sum_a exp b(a)], with b(a) = mean_t log p(a_t).
Source: Liu et al., arXiv 2205.05638, sections 3.2 and 3.3; the recipe there tunes IA3.
Cost: the decoder and the head on all answers of a row, the encoder once.
Use when: there are a few dozen rows, each with a small set of possible answers, and a T5-like model (T0 in the paper).
Not when: answers are free text (seq2seq), or there are thousands of rows and an encoder at hand (classification).
"""

from __future__ import annotations

from typing import ClassVar, final

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from luthier.core.errors import DataError
from luthier.data.answers import Answer, text_and_answers
from luthier.data.conversation import Meaning
from luthier.data.forest import Floats, Forest, Segment, Tree
from luthier.data.rendering.rendered import Rendered
from luthier.model.running.outputs import LossReport, TokenOutputs
from luthier.model.tasks import Task
from luthier.objectives import Objective

TINY = 1e-6
"""The least that 1 - p is taken for: a wrong answer that is certain has no logarithm."""


@final
class TFew(Objective):
    """Likelihood of the right answer, unlikelihood of the wrong ones, and a choice by mean log-probability."""

    separable: ClassVar[bool] = False

    unlikelihood: float = Field(1.0, ge=0, description="factor of the loss that makes wrong answers unlikely")
    length_normalised: float = Field(1.0, ge=0, description="factor of the loss by which answers compete")

    @property
    def meanings(self) -> tuple[Meaning, ...] | None:
        return ("choices",)

    def task(self, classes: tuple[str, ...]) -> Task:
        return Task("seq2seq_lm")

    def trees(self, view: Rendered, *, epoch: int = 0) -> list[Tree]:
        read, answers = text_and_answers(view)
        if sum(answer.right for answer in answers) != 1:
            raise DataError(f"row {view.row} has no right answer, or several", allowed="one right answer, others wrong")
        # A row weighs 1: half of it lies on the right answer and half on the others, so that all are predicted.
        ordered = sorted(answers, key=lambda answer: not answer.right)
        wrong = sum(len(answer.tokens) - 1 for answer in ordered[1:])
        share = 0.5 if wrong else 1.0
        said = [Segment(answer.tokens, _weights(answer, share, wrong), 0) for answer in ordered]
        return [Tree((read, *said), row=view.row)]

    def loss(self, outputs: TokenOutputs, forest: Forest) -> LossReport:
        answer, row, right = _owners(forest)
        device = outputs.log_probs.device
        of_answer = torch.from_numpy(answer).to(device)
        rows = torch.from_numpy(row).to(device)
        first = torch.from_numpy(right).to(device)
        means = _mean(outputs.log_probs, of_answer, len(row))
        likely = -means[first].sum()
        wrong = ~first[of_answer]
        doubts = (-torch.expm1(outputs.log_probs[wrong])).clamp(min=TINY).log()
        unlikely = -_mean(doubts, rows[of_answer[wrong]], len(forest.trees)).sum()
        nothing = torch.zeros(len(forest.trees), device=device)
        best = (nothing - torch.inf).scatter_reduce(0, rows, means.detach(), "amax")
        total = nothing.index_add(0, rows, (means - best[rows]).exp()).log() + best
        chosen = (total - means[first]).sum()
        return LossReport(
            likely + self.unlikelihood * unlikely + self.length_normalised * chosen,
            forest.weight,
            {"accuracy": (float((means[first] >= best).sum()), float(len(forest.trees)))},
        )


def _weights(answer: Answer, share: float, wrong: int) -> Floats:
    """What the tokens of an answer weigh: the start token nothing, those of all wrong answers the same."""
    count = len(answer.tokens) - 1
    each = share / count if answer.right else 0.5 / wrong
    weights = np.full(len(answer.tokens), each, dtype=np.float32)
    weights[0] = 0
    return weights


def _owners(forest: Forest) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each predicted token its answer, and for each answer its row's place and whether it is the right one."""
    answers: list[int] = []
    rows: list[int] = []
    right: list[bool] = []
    for place, tree in enumerate(forest.trees):
        for index, segment in enumerate(tree.segments[1:]):
            answers += [len(rows)] * int(np.count_nonzero(segment.weighted))
            rows.append(place)
            right.append(index == 0)
    return np.array(answers, dtype=np.int64), np.array(rows, dtype=np.int64), np.array(right, dtype=np.bool_)


def _mean(values: Float[Tensor, " n"], owner: Tensor, count: int) -> Float[Tensor, " count"]:
    """The mean over what belongs to each owner; 0 for an owner of nothing."""
    sums = torch.zeros(count, device=values.device).index_add(0, owner, values)
    sizes = torch.zeros(count, device=values.device).index_add(0, owner, torch.ones_like(values))
    return sums / sizes.clamp(min=1)
