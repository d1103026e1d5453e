"""Lion: the sign of a running mean, and nothing else.

Idea: every number moves by the learning rate, up or down; the direction is voted by the gradient and its running mean.
Equation: theta = theta - lr (sign(b1 m + (1-b1) g) + decay theta), then m = b2 m + (1-b2) g.
Source: Chen et al., arXiv 2302.06675, algorithm 2, and section 5 for rates: three to ten times smaller than AdamW's,
    with three to ten times its decay.
Cost: 4 bytes of state a parameter.
Use when: batches are large and AdamW's second moment does not fit.
Not when: batches are small: noise decides signs as loudly as signal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from typing import Any, final

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer as TorchOptimizer

from luthier.optimizers import Optimizer, PerTensor, decay_groups


@final
class Lion(Optimizer):
    """Sign of the interpolated momentum, with decoupled weight decay on matrices only."""

    learning_rate: float = Field(3.0e-5, gt=0, description="peak learning rate: how far each number moves in a step")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay of matrices; vectors never decay")
    beta1: float = Field(0.9, ge=0, lt=1, description="weight of the running mean in the vote")
    beta2: float = Field(0.99, ge=0, lt=1, description="decay of the running mean")

    @property
    def peak_learning_rate(self) -> float:
        return self.learning_rate

    def build(self, parameters: Mapping[str, Tensor]) -> TorchOptimizer:
        defaults = {"lr": self.learning_rate, "beta1": self.beta1, "beta2": self.beta2}
        return _Signs(decay_groups(parameters, self.weight_decay), defaults)

    def state_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        return 4 * sum(map(math.prod, shapes.values()))


@final
class _Signs(PerTensor):
    def update(
        self, tensor: Tensor, gradient: Tensor, state: MutableMapping[str, Any], group: Mapping[str, Any]
    ) -> None:
        if "mean" not in state:
            state["mean"] = torch.zeros_like(gradient)
        mean = state["mean"]
        vote = torch.lerp(mean, gradient, 1 - group["beta1"]).sign_()
        tensor.mul_(1 - group["lr"] * group["weight_decay"]).sub_(vote, alpha=group["lr"])
        mean.lerp_(gradient, 1 - group["beta2"])
