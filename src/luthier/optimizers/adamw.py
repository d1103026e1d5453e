"""AdamW: Adam with decoupled weight decay.

Idea: a step along the running mean of the gradient, scaled by the running root mean square of each coordinate; weights
decay towards zero beside it, not through the gradient.
Equation: m = b1 m + (1-b1) g, v = b2 v + (1-b2) g^2, theta = theta - lr (m^ / (sqrt(v^) + eps) + decay theta).
Source: Loshchilov and Hutter, arXiv 1711.05101, algorithm 2; torch's own fused implementation computes it.
Cost: 8 bytes of state a parameter.
Use when: always, unless memory forbids it.
Not when: the states of a fully tuned large model do not fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import final

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import AdamW as TorchAdamW
from torch.optim import Optimizer as TorchOptimizer

from luthier.optimizers import Optimizer, WithoutCompiler, decay_groups


@final
class AdamW(Optimizer):
    """AdamW with weight decay on matrices only."""

    learning_rate: float = Field(2.0e-4, gt=0, description="peak learning rate")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay of matrices; vectors never decay")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the running mean of gradients")
    beta2: float = Field(0.999, ge=0, lt=1, description="decay of the running mean of squared gradients")
    epsilon: float = Field(1.0e-8, gt=0, description="added to the root mean square")

    @property
    def peak_learning_rate(self) -> float:
        return self.learning_rate

    def build(self, parameters: Mapping[str, Tensor]) -> TorchOptimizer:
        return _Fused(
            decay_groups(parameters, self.weight_decay),
            lr=self.learning_rate,
            betas=(self.beta1, self.beta2),
            eps=self.epsilon,
            fused=True,
        )

    def state_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        return 8 * sum(map(math.prod, shapes.values()))


@final
class _Fused(WithoutCompiler, TorchAdamW):
    """Torch's AdamW, stepped by its fused operation without what its compiler would want to know."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step every tensor that has a gradient. A closure is torch's way to compute the loss again; nobody does."""
        for group in self.param_groups:
            held: tuple[list[Tensor], ...] = ([], [], [], [], [], [])
            self._init_group(group, *held)
            tensors, gradients, means, squares, largest, steps = held
            if not tensors:
                continue
            torch._foreach_add_(steps, 1)
            beta1, beta2 = group["betas"]
            torch._fused_adamw_(
                tensors, gradients, means, squares, largest, steps, lr=group["lr"], beta1=beta1, beta2=beta2,
                weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False, maximize=False,
            )  # fmt: skip
