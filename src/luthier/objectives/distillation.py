"""Distillation: a policy learns what a teacher would say, on its own answers or on given ones.

Idea: a student that only sees perfect answers never learns to go on from its own. So it answers itself, and a teacher
says of each of its tokens how likely it would have been: a reward for every token, and none that has to be written.
The teacher is a bigger model, a run, or the same model with a prompt in front, which is then learned by heart (context
distillation). Its vocabulary must be the student's.
Equation: sampled: a policy gradient with A_t = log teacher(y_t) - log student(y_t), as ratios see it clipped, whose
    loss is an estimate of the reverse KL; forward, reverse, jsd: the divergence over the whole vocabulary at each token
    (maths/divergences.py), whose gradient does not go through the sampling. All are means over tokens.
Source: Agarwal et al., arXiv 2306.13649 (GKD; divergences, on-policy); Gu et al., arXiv 2306.08543 (MiniLLM; the
    reverse KL as a policy gradient); Snell et al., arXiv 2209.15189 (context distillation).
Cost: rollouts where answers are sampled; a forward and backward pass over prompt and answers, and a forward pass of the
    teacher; whole divergences make the logits of both, a few rows at a time.
Use when: a model that does it well is there, and is too large or needs too long a prompt to be kept.
Not when: the teacher's tokens are others; or it can only be asked for answers (then train sft on them).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, final

from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from luthier.core.errors import RecipeError
from luthier.data.conversation import WORDS, Meaning
from luthier.data.forest import Forest, Note, Tree, row_tree
from luthier.data.rendering.rendered import Rendered
from luthier.data.rollout_learner import RolloutLearner
from luthier.data.rollouts import Group, grown
from luthier.maths.divergences import Comparison
from luthier.maths.policies import clipped_losses, is_clipped
from luthier.model.running.outputs import LossReport, TokenOutputs
from luthier.objectives import Objective


@final
class Distillation(RolloutLearner, Objective):
    """Near to a teacher, token by token."""

    separable: ClassVar[bool] = False
    requires: ClassVar[frozenset[str]] = frozenset()
    rewarded: ClassVar[bool] = False

    answers: Literal["sampled", "given"] = Field(
        "sampled", description="whose answers are learned from: the model's own (recipe reinforce), or the rows'"
    )
    divergence: Literal["sampled", "forward", "reverse", "jsd"] = Field(
        "sampled", description="what is made small: the reverse KL by the tokens that were sampled, or a divergence "
        "over the whole vocabulary"
    )  # fmt: skip
    share: float = Field(0.5, gt=0, lt=1, description="the teacher's part in the middle of jsd (beta of GKD)")
    clip: float = Field(0.2, gt=0, lt=1, description="how far from 1 a ratio counts, where divergence is sampled")
    temperature: float = Field(1.0, gt=0, description="of the policies that are compared, and of sampling")
    passes: int = Field(1, ge=1, description="times that a rollout is gone through")
    minibatches: int = Field(1, ge=1, description="optimizer steps in each time")

    @model_validator(mode="after")
    def _fits(self) -> Distillation:
        if self.answers == "given" and self.divergence == "sampled":
            raise RecipeError(
                "answers is given and divergence is sampled, and the model has not sampled them",
                allowed="divergence forward, reverse or jsd for given answers",
            )
        return self

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"rollouts"} if self.answers == "sampled" else ())

    @property
    def meanings(self) -> tuple[Meaning, ...] | None:
        return ("asked",) if self.answers == "sampled" else WORDS

    @property
    def reference(self) -> bool:
        return self.divergence == "sampled"

    @property
    def taught(self) -> bool:
        return True

    @property
    def comparison(self) -> Comparison | None:
        return None if self.divergence == "sampled" else Comparison(self.divergence, self.share)

    @property
    def recalled(self) -> frozenset[Note]:
        # The first and only pass finds both itself.
        again = self.divergence == "sampled" and self.passes * self.minibatches > 1
        return frozenset[Note](["old", "reference"] if again else [])

    def trees(self, view: Rendered, *, epoch: int = 0) -> list[Tree]:
        if self.answers == "sampled":
            return RolloutLearner.trees(self, view, epoch=epoch)
        return [row_tree(view.tokens, view.weights, row=view.row)]

    def grow(self, group: Group) -> Tree:
        return grown(group, lambda answer: 1.0)

    def credited(self, groups: Sequence[Group], trees: Sequence[Tree], *, leash: float) -> tuple[list[Tree], float]:
        return list(trees), leash

    def loss(self, outputs: TokenOutputs, forest: Forest) -> LossReport:
        sums: dict[str, Any] = {"entropy": -outputs.log_probs.detach()}
        losses = self._by_samples(outputs, sums) if self.divergence == "sampled" else self._whole(outputs, sums)
        weighed = outputs.weights * losses
        count = float(len(losses))
        return LossReport(
            weighed.sum(),
            forest.weight,
            {name: (float(each.sum()), count) for name, each in sums.items()},
            weighed.new_zeros(len(forest.trees)).index_add(0, outputs.trees.long(), weighed.detach()),
            {"mismatch_most": float(sums["mismatch"].max())} if "mismatch" in sums and len(losses) else {},
        )

    def _whole(self, outputs: TokenOutputs, sums: dict[str, Any]) -> Float[Tensor, " N"]:
        if outputs.divergences is None:
            raise RecipeError(
                "distillation is given no divergences",
                allowed="outputs that were compared with a teacher's",
                do="ask train/reference.py for them, with the comparison that the objective names",
            )
        sums["kl"] = outputs.divergences.detach()
        return outputs.divergences

    def _by_samples(self, outputs: TokenOutputs, sums: dict[str, Any]) -> Float[Tensor, " N"]:
        log_probs, notes = outputs.log_probs, outputs.notes
        old = notes.get("old", log_probs.detach())
        ratio, advantage = (log_probs - old).exp(), notes["reference"] - old
        if "correction" in notes:
            advantage = advantage * notes["correction"]
            sums["correction"] = notes["correction"]
        sums["kl"] = (log_probs - notes["reference"]).detach()
        sums["clipped"] = is_clipped(ratio.detach(), advantage, low=self.clip, high=self.clip)
        if "sampled" in notes:
            sums["mismatch"] = (old - notes["sampled"]).abs()
        return clipped_losses(ratio, advantage, low=self.clip, high=self.clip)
