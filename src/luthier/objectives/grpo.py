"""GRPO and its kin: a policy learns from groups of its own answers, without a model of their value.

Idea: several answers to one prompt are each other's baseline: those worth more than their group become likelier, the
others less likely. What differs among the kin is whether advantages are divided by the spread of the group, what an
answer's tokens weigh, and of what the ratio to the sampling policy is taken.
Equation: sum_t w_t [max(-rho_t A, -clip(rho_t, 1 - low, 1 + high) A) + beta k3_t] / sum_t w_t, with w_t = 1/|o| per
    answer or 1 (dapo); dr_grpo sums over tokens and divides by a constant; rho of a token, of an answer's geometric
    mean (gspo), or of the whole answer (rloo); A by its group (maths/advantages.py).
Source: grpo: Shao et al., arXiv 2402.03300, equation 3; dr_grpo: Liu et al., arXiv 2503.20783, section 3.2; dapo:
    Yu et al., arXiv 2503.14476, equation 8; gspo: Zheng et al., arXiv 2507.18071, equations 5 to 7; rloo: Ahmadian et
    al., arXiv 2402.14740; truncated importance weights (correction): Yao et al., Off-policy RL (2025), as in TRL.
Cost: rollouts; one forward and backward pass over prompt and answers; another forward pass where beta is above 0, and
    one where a rollout is used more than once.
Use when: answers can be scored, and some of the model's own answers to a prompt are better than others.
Not when: the model never gets it right (sft first); or one answer a prompt is all there can be (ppo).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Literal, final

import numpy as np
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from luthier.data.forest import Forest, Note, Tree
from luthier.data.rollout_learner import RolloutLearner
from luthier.data.rollouts import Answer, Group, grown, noting
from luthier.maths.advantages import Baseline, Scale, group_advantages
from luthier.maths.policies import clipped_losses, is_clipped, k3
from luthier.model.compared import Answers
from luthier.model.running.outputs import LossReport, TokenOutputs
from luthier.objectives import Objective

Preset = Literal["dr_grpo", "grpo", "dapo", "gspo", "rloo"]


@dataclass(frozen=True, kw_only=True)
class Kin:
    """What one of the kin does."""

    scale: Scale = "none"
    baseline: Baseline = "mean"
    weights: Literal["answer", "token"] = "answer"
    """Whether each answer weighs 1, or each token."""
    constant: bool = False
    """Whether an answer counts by the sum over its tokens divided by a constant, not by the mean over them."""
    ratio: Literal["token", "mean", "whole"] = "token"
    beta: float = 0.0
    low: float = 0.2
    high: float = 0.2


KIN: Final[Mapping[Preset, Kin]] = {
    "dr_grpo": Kin(constant=True),
    "grpo": Kin(scale="group", beta=0.04),
    "dapo": Kin(scale="group", weights="token", high=0.28),
    "gspo": Kin(scale="group", ratio="mean", low=3e-4, high=4e-4),
    "rloo": Kin(baseline="others", ratio="whole"),
}


@final
class GRPO(RolloutLearner, Objective):
    """Clipped policy gradients with the group as the baseline."""

    separable: ClassVar[bool] = True
    compared: ClassVar[bool] = True

    preset: Preset = Field("dr_grpo", description="which of the kin, and what is not set below")
    beta: float | None = Field(None, ge=0, description="factor of the KL to the model without its adapter")
    clip_low: float | None = Field(None, gt=0, lt=1, description="how far below 1 a ratio counts")
    clip_high: float | None = Field(None, gt=0, description="how far above 1 a ratio counts")
    longest: int = Field(256, ge=1, description="tokens by which dr_grpo divides the sum over an answer")
    temperature: float = Field(1.0, gt=0, description="at which answers are sampled, and the policy is trained")
    passes: int = Field(1, ge=1, description="times that a rollout is gone through")
    minibatches: int = Field(1, ge=1, description="optimizer steps in each time")
    old: Literal["trainer", "sampler"] = Field(
        "trainer", description="whose log-probabilities ratios begin from: those found again before the first step, "
        "or those told while sampling"
    )  # fmt: skip
    correction: float | None = Field(
        None, ge=1, description="most that a token counts for, as the trainer finds it likelier than the sampler did"
    )

    @property
    def kin(self) -> Kin:
        """The preset."""
        return KIN[self.preset]

    @property
    def reference(self) -> bool:
        return self._beta > 0

    @property
    def recalled(self) -> frozenset[Note]:
        # The first and only pass finds them itself, at no cost: they are what it finds.
        again = self.old == "trainer" and self.passes * self.minibatches > 1
        return frozenset[Note](["old"] if again else [])

    @property
    def _beta(self) -> float:
        return self.kin.beta if self.beta is None else self.beta

    def grow(self, group: Group) -> Tree:
        return grown(group, self._weight)

    def credited(self, groups: Sequence[Group], trees: Sequence[Tree], *, leash: float) -> tuple[list[Tree], float]:
        found = []
        for group, tree in zip(groups, trees, strict=True):
            all_of_them = group_advantages(group.rewards, baseline=self.kin.baseline, scale=self.kin.scale)
            own = [np.full(group.answers[place].length, all_of_them[place]) for place in group.trained]
            found.append(noting(tree, "advantage", own))
        return found, leash

    def loss(self, outputs: TokenOutputs, forest: Forest) -> LossReport:
        answers = Answers.of(outputs, forest)
        sampled, log_probs = outputs.notes["sampled"], outputs.log_probs
        old = sampled if self.old == "sampler" else outputs.notes.get("old", log_probs.detach())
        ratio = self._ratio(log_probs - old, answers)
        advantage = outputs.notes["advantage"]
        if "correction" in outputs.notes:
            advantage = advantage * outputs.notes["correction"]
        elif self.correction is not None:
            advantage = advantage * (old - sampled).exp().clamp(max=self.correction)
        low = self.kin.low if self.clip_low is None else self.clip_low
        high = self.kin.high if self.clip_high is None else self.clip_high
        losses = clipped_losses(ratio, advantage, low=low, high=high)
        off = (old - sampled).detach().abs()
        sums = {
            "clipped": is_clipped(ratio.detach(), advantage, low=low, high=high), "ratio": ratio.detach(),
            "entropy": -log_probs.detach(), "mismatch": off,
        }  # fmt: skip
        if "correction" in outputs.notes:
            sums["correction"] = outputs.notes["correction"]
        if self.reference:
            kl = k3(log_probs, outputs.notes["reference"])
            losses = losses + self._beta * kl
            sums["kl"] = kl.detach()
        weighed = outputs.weights * losses * self._scale(answers)
        count = float(len(off))
        return LossReport(
            weighed.sum(),
            forest.weight,
            {name: (float(each.sum()), count) for name, each in sums.items()},
            weighed.new_zeros(len(forest.trees)).index_add(0, outputs.trees.long(), weighed),
            {"mismatch_most": float(off.max()) if len(off) else 0.0},
        )

    def _weight(self, answer: Answer) -> float:
        return 1.0 if self.kin.weights == "token" else 1.0 / answer.length

    def _ratio(self, ahead: Float[Tensor, " N"], answers: Answers) -> Float[Tensor, " N"]:
        """How much likelier what was said has become, token by token or the same for all tokens of an answer."""
        if self.kin.ratio == "token":
            return ahead.exp()
        of_answer = answers.means(ahead) if self.kin.ratio == "mean" else answers.sums(ahead)
        return of_answer.exp()[answers.owner]

    def _scale(self, answers: Answers) -> Float[Tensor, " N"] | float:
        """What makes a sum over a constant of a mean over the tokens of an answer."""
        if self.kin.constant:
            return (answers.sizes / self.longest)[answers.owner]
        return 1.0
