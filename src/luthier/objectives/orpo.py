"""ORPO: odds ratio preference optimisation, imitation and preference in one stage and without a reference.

Idea: imitate the chosen answer, and push its odds above those of the rejected one. The odds are of an answer's mean
probability a token, so that long answers are not at a disadvantage, and need no reference to be compared.
Equation: L = -log P_w + lambda [-log sigmoid(log odds_w - log odds_l)], log P = mean_t log pi(y_t), odds = P / (1 - P).
Source: Hong et al., arXiv 2403.07691, equations 4 to 7; there lambda is 0.1, and 1 in the authors' code.
Cost: one forward and backward pass over prompt and answers.
Use when: a base model shall learn to answer and to prefer at once; memory or time for a reference lacks.
Not when: the model answers well already and shall only be steered (dpo, which is held to a reference).
"""

from __future__ import annotations

from typing import ClassVar, final

from pydantic import Field

from luthier.data.conversation import Meaning
from luthier.data.forest import Forest, Tree
from luthier.data.rendering.rendered import Rendered
from luthier.maths.preferences import log_odds, pair_losses
from luthier.model.compared import Pairs, compared_tree
from luthier.model.running.outputs import LossReport, TokenOutputs
from luthier.objectives import Objective


@final
class ORPO(Objective):
    """Likelihood of the best answer, and odds ratios."""

    separable: ClassVar[bool] = False

    odds: float = Field(0.1, ge=0, description="factor of the loss of odds ratios (lambda)")

    @property
    def meanings(self) -> tuple[Meaning, ...] | None:
        return ("preference",)

    def trees(self, view: Rendered, *, epoch: int = 0) -> list[Tree]:
        return [compared_tree(view)]

    def loss(self, outputs: TokenOutputs, forest: Forest) -> LossReport:
        pairs = Pairs.of(outputs, forest)
        log_probs = pairs.answers.means(outputs.log_probs)
        losses = pair_losses(pairs.difference(log_odds(log_probs)), kind="sigmoid")
        of_trees = self.odds * pairs.by_tree(losses) - log_probs[pairs.answers.best]
        return LossReport(of_trees.sum(), forest.weight, pairs.metrics(log_probs, log_probs), of_trees)
