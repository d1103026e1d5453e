"""PPO: a policy learns from its own answers, token by token, with a value head that says what was to be expected.

Idea: the reward comes at the end of an answer, and what a token had to do with it is told by the values before and
after it. Every token pays for how far it leads away from the reference, so the policy stays near to where it began.
Ratios to the policy that sampled are clipped, and so is how fast values may move; a rollout serves several passes.
Equation: r_t = -beta (log pi_old - log ref) + 1[t last] R; A by GAE (maths/gae.py), over the tokens the model said,
    whitened over the rollout; loss = mean_t [max(-rho A, -clip(rho) A) + f 1/2 max((V - G)^2, (clip(V) - G)^2)], with
    the mean over all tokens of the step.
Source: Schulman et al., arXiv 1707.06347, equations 7 and 9; Ouyang et al., arXiv 2203.02155, section 3.5 and appendix
    C.4; adaptive beta: Ziegler et al., arXiv 1909.08593, section 2.2; defaults as in TRL.
Cost: rollouts; two forward passes without a graph (policy with values, reference); then `passes` forward and backward.
Use when: one answer a prompt is what there is, or a reward is dense or learned and the leash has to hold.
Not when: several answers to a prompt can be sampled and compared (grpo), which needs no values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, final

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator

from luthier.core.errors import RecipeError
from luthier.data.forest import Forest, Note, Tree
from luthier.data.rollout_learner import RolloutLearner
from luthier.data.rollouts import Group, grown, leaf_notes, noting
from luthier.maths.advantages import whitened
from luthier.maths.gae import gae
from luthier.maths.policies import adapted_leash, clipped_losses, is_clipped, value_losses
from luthier.model.editing.edits import Edit
from luthier.model.editing.value_head import ValueHead
from luthier.model.running.outputs import LossReport, TokenOutputs
from luthier.objectives import Objective

_RATE = 0.1
"""How fast the leash adapts, for each rollout."""


@final
class PPO(RolloutLearner, Objective):
    """Clipped policy gradients with values, and a penalty on the way from the reference."""

    separable: ClassVar[bool] = True

    beta: float = Field(0.05, ge=0, description="what a nat of distance to the reference costs, in reward")
    target_kl: float | None = Field(None, gt=0, description="nats an answer may be away, which beta adapts to")
    clip: float = Field(0.2, gt=0, lt=1, description="how far from 1 a ratio counts")
    value_clip: float = Field(0.2, gt=0, description="how far a value may move in the passes over one rollout")
    value_factor: float = Field(0.1, ge=0, description="factor of the values' loss")
    value_rate: float = Field(1.0, gt=0, description="learning rate of the value head, as a factor of the adapter's")
    gamma: float = Field(1.0, gt=0, le=1, description="what a reward one token later is worth")
    lam: float = Field(0.95, ge=0, le=1, description="from one step of the values (0) to the whole return (1)")
    temperature: float = Field(1.0, gt=0, description="at which answers are sampled, and the policy is trained")
    passes: int = Field(4, ge=1, description="times that a rollout is gone through")
    minibatches: int = Field(1, ge=1, description="optimizer steps in each time")

    @model_validator(mode="after")
    def _can_adapt(self) -> PPO:
        if self.target_kl is not None and not self.beta:
            raise RecipeError(
                f"beta is 0 and target_kl is {self.target_kl:g}, and beta adapts by a factor: 0 stays 0",
                allowed="a beta above 0 to begin with",
                do="set beta to 0.05, or leave target_kl out",
            )
        return self

    @property
    def recalled(self) -> frozenset[Note]:
        return frozenset[Note](["old", "reference", "value"])

    @property
    def leash(self) -> float:
        return self.beta

    def own(self, size: int, device: torch.device) -> list[Edit]:
        return [ValueHead(size, device=device, rate_factor=self.value_rate)]

    def grow(self, group: Group) -> Tree:
        return grown(group, lambda answer: 1.0)

    def credited(self, groups: Sequence[Group], trees: Sequence[Tree], *, leash: float) -> tuple[list[Tree], float]:
        advantages: list[list[NDArray[np.float64]]] = []
        returns: list[list[NDArray[np.float64]]] = []
        distances: list[float] = []
        for group, tree in zip(groups, trees, strict=True):
            advantages.append([])
            returns.append([])
            notes = (leaf_notes(tree, note) for note in ("old", "reference", "value"))
            for place, old, reference, values in zip(group.trained, *notes, strict=True):
                away = (old - reference).astype(np.float64)
                rewards = -leash * away
                rewards[-1] += group.answers[place].reward
                found, to_come = gae(rewards, values, gamma=self.gamma, lam=self.lam)
                advantages[-1].append(found)
                returns[-1].append(to_come)
                distances.append(float(away.sum()))
        flat = whitened(np.concatenate([each for own in advantages for each in own]))
        made, start = [], 0
        for tree, own, to_come_of in zip(trees, advantages, returns, strict=True):
            sizes = [len(each) for each in own]
            ends = start + np.cumsum(sizes)
            parts = [flat[end - size : end] for size, end in zip(sizes, ends, strict=True)]
            made.append(noting(noting(tree, "advantage", parts), "return", to_come_of))
            start = int(ends[-1])
        if self.target_kl is None:
            return made, leash
        return made, adapted_leash(leash, float(np.mean(distances)), target=self.target_kl, rate=_RATE)

    def loss(self, outputs: TokenOutputs, forest: Forest) -> LossReport:
        if outputs.values is None:
            raise RecipeError(
                "ppo is given no values", allowed="a model with a value head", do="attach what own() gives"
            )
        notes, log_probs, weights = outputs.notes, outputs.log_probs, outputs.weights
        ratio, advantage = (log_probs - notes["old"]).exp(), notes["advantage"]
        if "correction" in notes:
            advantage = advantage * notes["correction"]
        policy = clipped_losses(ratio, advantage, low=self.clip, high=self.clip)
        values = value_losses(outputs.values, notes["value"], notes["return"], clip=self.value_clip)
        losses = weights * (policy + self.value_factor * values)
        sums: dict[str, Any] = {
            "clipped": is_clipped(ratio.detach(), advantage, low=self.clip, high=self.clip), "ratio": ratio.detach(),
            "entropy": -log_probs.detach(), "kl": (log_probs - notes["reference"]).detach(),
            "value_error": (outputs.values - notes["return"]).detach().square(),
            "mismatch": (notes["old"] - notes["sampled"]).abs(),
        }  # fmt: skip
        if "correction" in notes:
            sums["correction"] = notes["correction"]
        count = float(len(ratio))
        return LossReport(
            losses.sum(),
            forest.weight,
            {name: (float(each.sum()), count) for name, each in sums.items()},
            losses.new_zeros(len(forest.trees)).index_add(0, outputs.trees.long(), losses),
            {"mismatch_most": float(sums["mismatch"].max()) if len(ratio) else 0.0},
        )
