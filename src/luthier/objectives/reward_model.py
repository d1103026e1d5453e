"""Reward model: a number that says how good an answer is, learned from which of two answers people preferred.

Idea: a linear layer over the state of an answer's last token gives its score. The difference of two scores is the log
odds that one answer is preferred to the other; of a ranking all pairs are learned from at once.
Equation: L = -1/C(K,2) sum_{better, worse} log sigmoid(r_better - r_worse - m) + c (r_better + r_worse)^2, where m is a
    margin and c keeps scores centred.
Source: Ouyang et al., arXiv 2203.02155, equation 1; margin: Touvron et al., arXiv 2307.09288, section 3.2.2; centring:
    Eisenstein et al., arXiv 2312.09244, section 3; probabilities: Lee et al., arXiv 2309.00267, section 2.2.
Cost: one forward and backward pass over prompt and answers; the head is evaluated on one position of each answer.
Use when: answers shall be scored: to train a policy on the scores, to choose the best of several, to filter data.
Not when: a policy shall be trained on these very pairs (dpo, orpo, simpo need no reward model).
"""

from __future__ import annotations

from typing import ClassVar, final

from pydantic import Field

from luthier.core.errors import DataError
from luthier.data.conversation import Meaning
from luthier.data.forest import Forest, Tree
from luthier.data.rendering.rendered import Rendered
from luthier.data.training_rows import TrainingRows
from luthier.maths.preferences import pair_losses
from luthier.model.compared import Pairs, ScoreUse, compared_tree, require_scores
from luthier.model.running.outputs import LossReport, TokenOutputs
from luthier.model.tasks import SCORES, Task
from luthier.objectives import Objective


@final
class RewardModel(Objective):
    """Bradley-Terry on scores of answers."""

    separable: ClassVar[bool] = False

    scores: ScoreUse = Field(
        "unused",
        description="what a difference of the rows' own scores is: unused, the margin that a pair has to keep, or the "
        "log odds that it is the right way round",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of pairs taken to be the wrong way round")
    centring: float = Field(0.0, ge=0, description="factor of the squared sum of both scores, which keeps it near 0")

    @property
    def meanings(self) -> tuple[Meaning, ...] | None:
        return ("preference",)

    def task(self, classes: tuple[str, ...]) -> Task:
        return SCORES

    def remarks(self, rows: TrainingRows) -> list[str]:
        return require_scores(rows, self.scores)

    def trees(self, view: Rendered, *, epoch: int = 0) -> list[Tree]:
        return [compared_tree(view, at_end=True)]

    def loss(self, outputs: TokenOutputs, forest: Forest) -> LossReport:
        if outputs.scores is None:
            raise DataError("the model has no scores", allowed="a model that was loaded for scores")
        pairs = Pairs.of(outputs, forest)
        rewards = outputs.scores
        losses = pair_losses(
            pairs.difference(rewards),
            kind="sigmoid",
            margin=pairs.margin(self.scores),
            flipped=pairs.flipped(self.scores, self.label_smoothing),
        )
        if self.centring:
            losses = losses + self.centring * (rewards[pairs.better] + rewards[pairs.worse]).square()
        of_trees = pairs.by_tree(losses)
        return LossReport(of_trees.sum(), forest.weight, pairs.metrics(rewards), of_trees)
