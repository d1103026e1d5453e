"""SimPO: simple preference optimisation, by mean log-probabilities and a margin, without a reference.

Idea: what generation goes by, the mean log-probability of an answer's tokens, is the reward itself; the chosen answer
has to be ahead by a margin. Without a leash it can run away from what the model was: a small learning rate has to do.
Equation: L = -log sigmoid(beta [mean_t log pi(y_w,t) - mean_t log pi(y_l,t)] - gamma).
Source: Meng et al., arXiv 2405.14734, equation 6; its ranges are beta 2 to 10 and gamma 0.3 to 1.6.
Cost: one forward and backward pass over prompt and answers.
Use when: a reference costs too much, or answers of one kind win by their length under dpo.
Not when: the model must stay near to what it was (dpo); the likelihood of both answers may fall.
"""

from __future__ import annotations

from typing import ClassVar, final

from pydantic import Field

from luthier.data.conversation import Meaning
from luthier.data.forest import Forest, Tree
from luthier.data.rendering.rendered import Rendered
from luthier.maths.preferences import pair_losses
from luthier.model.compared import Pairs, compared_tree
from luthier.model.running.outputs import LossReport, TokenOutputs
from luthier.objectives import Objective


@final
class SimPO(Objective):
    """A logistic loss on mean log-probabilities."""

    separable: ClassVar[bool] = False

    beta: float = Field(2.0, gt=0, description="factor of mean log-probabilities")
    gamma: float = Field(1.0, ge=0, description="the margin that a chosen answer has to be ahead by")
    sft: float = Field(0.0, ge=0, description="factor of the chosen answers' own mean loss, which keeps them likely")

    @property
    def meanings(self) -> tuple[Meaning, ...] | None:
        return ("preference",)

    def trees(self, view: Rendered, *, epoch: int = 0) -> list[Tree]:
        return [compared_tree(view)]

    def loss(self, outputs: TokenOutputs, forest: Forest) -> LossReport:
        pairs = Pairs.of(outputs, forest)
        log_probs = pairs.answers.means(outputs.log_probs)
        losses = pair_losses(pairs.difference(log_probs), kind="sigmoid", beta=self.beta, margin=self.gamma)
        of_trees = pairs.by_tree(losses)
        if self.sft:
            of_trees = of_trees - self.sft * log_probs[pairs.answers.best]
        return LossReport(of_trees.sum(), forest.weight, pairs.metrics(self.beta * log_probs, log_probs), of_trees)
