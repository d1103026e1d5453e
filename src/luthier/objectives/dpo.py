"""DPO: direct preference optimisation, a policy learned from pairs of answers without a reward model.

Idea: the policy that is best under a reward and a leash to a reference says of that reward what it is: how much more
likely it finds an answer than the reference does. So pairs are learned from as a reward model would, with these log
ratios in the place of scores. The reference is the model with the adapter switched off.
Equation: h = [log pi(y_w) - log ref(y_w)] - [log pi(y_l) - log ref(y_l)], sums over answer tokens;
    sigmoid: -(1-e) log sigmoid(beta h) - e log sigmoid(-beta h); hinge: max(0, 1 - beta h); ipo: (h - 1/(2 beta))^2,
    with means over answer tokens in h. `sft` adds -sft log pi(y_w) / |y_w|.
Source: Rafailov et al., arXiv 2305.18290, equation 7; smoothing: Mitchell, A note on DPO with noisy preferences (2023);
    ipo: Azar et al., arXiv 2310.12036, means as its authors confirmed to TRL; hinge: arXiv 2305.10425; sft:
    arXiv 2404.19733; scores as margin: arXiv 2402.10571.
Cost: one forward and backward pass over prompt and answers, and one forward pass of the reference.
Use when: there are pairs of answers, and the model already answers in the right form (train sft on such answers first).
Not when: answers were judged one by one (kto); or memory or time for a reference lacks (orpo, simpo).
"""

from __future__ import annotations

from typing import ClassVar, final

from pydantic import Field, model_validator

from luthier.core.errors import RecipeError
from luthier.data.conversation import Meaning
from luthier.data.forest import Forest, Tree
from luthier.data.rendering.rendered import Rendered
from luthier.data.training_rows import TrainingRows
from luthier.maths.preferences import PairLoss, pair_losses
from luthier.model.compared import Pairs, ScoreUse, compared_tree, require_scores
from luthier.model.running.outputs import LossReport, TokenOutputs
from luthier.objectives import Objective


@final
class DPO(Objective):
    """A logistic loss on differences of log ratios, or one of its kin."""

    separable: ClassVar[bool] = False

    beta: float = Field(0.1, gt=0, description="how short the leash to the reference is")
    shape: PairLoss = Field("sigmoid", description="what is done with the difference of log ratios")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of pairs taken to be the wrong way round")
    sft: float = Field(0.0, ge=0, description="factor of the chosen answers' own mean loss, which keeps them likely")
    scores: ScoreUse = Field(
        "unused",
        description="what a difference of the rows' own scores is: unused, the margin that a pair has to keep, or the "
        "log odds that it is the right way round",
    )

    @model_validator(mode="after")
    def _fits(self) -> DPO:
        if self.scores == "margin" and self.shape == "ipo":
            raise RecipeError(
                "scores is margin and shape is ipo, whose target is a margin itself",
                allowed="shape sigmoid or hinge with a margin, or scores unused or probability",
            )
        return self

    @property
    def reference(self) -> bool:
        return True

    @property
    def meanings(self) -> tuple[Meaning, ...] | None:
        return ("preference",)

    def remarks(self, rows: TrainingRows) -> list[str]:
        return require_scores(rows, self.scores)

    def trees(self, view: Rendered, *, epoch: int = 0) -> list[Tree]:
        return [compared_tree(view)]

    def loss(self, outputs: TokenOutputs, forest: Forest) -> LossReport:
        pairs = Pairs.of(outputs, forest)
        answers = pairs.answers
        ratios = outputs.log_probs - outputs.notes["reference"]
        whole = answers.sums(ratios)
        log_probs = answers.means(outputs.log_probs)
        losses = pair_losses(
            pairs.difference(answers.means(ratios) if self.shape == "ipo" else whole),
            kind=self.shape,
            beta=self.beta,
            margin=pairs.margin(self.scores),
            flipped=pairs.flipped(self.scores, self.label_smoothing),
        )
        of_trees = pairs.by_tree(losses)
        if self.sft:
            of_trees = of_trees - self.sft * log_probs[answers.best]
        return LossReport(of_trees.sum(), forest.weight, pairs.metrics(self.beta * whole, log_probs), of_trees)
