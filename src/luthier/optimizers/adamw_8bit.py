"""AdamW in eight bits: a byte for each moment, and one scale for 256 of them.

Idea: what Adam remembers of a number needs no 32 bits: a byte for each moment, and a scale for 256 of them, follow the
float32 run closely. Steps themselves are computed in float32.
Equation: AdamW's (see adamw), with m and v kept as s_b level[code], s_b the largest of their block.
Source: Dettmers et al., arXiv 2110.02861, sections 2 and 3: block-wise dynamic quantization; blocks of 256 and float32
    below 4,096 numbers as in bitsandbytes.
Cost: 2.03 bytes of state a parameter instead of 8; a step looks every moment up twice.
Use when: all weights of a model are trained and their states do not fit.
Not when: an adapter is trained: its states are small, and float32 is free there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from typing import Any, final

from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer as TorchOptimizer

from luthier.maths import moments
from luthier.optimizers import Optimizer, PerTensor, decay_groups


@final
class AdamW8Bit(Optimizer):
    """AdamW whose moments take a byte each; weight decay on matrices only."""

    learning_rate: float = Field(2.0e-4, gt=0, description="peak learning rate")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay of matrices; vectors never decay")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the running mean of gradients")
    beta2: float = Field(0.999, ge=0, lt=1, description="decay of the running mean of squared gradients")
    epsilon: float = Field(1.0e-8, gt=0, description="added to the root mean square")

    @property
    def peak_learning_rate(self) -> float:
        return self.learning_rate

    def build(self, parameters: Mapping[str, Tensor]) -> TorchOptimizer:
        knobs = {"beta1": self.beta1, "beta2": self.beta2, "epsilon": self.epsilon}
        return _InBytes(decay_groups(parameters, self.weight_decay), {"lr": self.learning_rate, **knobs})

    def state_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        return sum(moments.state_bytes(math.prod(shape), eight_bit=True) for shape in shapes.values())


@final
class _InBytes(PerTensor):
    def update(
        self, tensor: Tensor, gradient: Tensor, state: MutableMapping[str, Any], group: Mapping[str, Any]
    ) -> None:
        state["step"] = step = state.get("step", 0) + 1
        betas = {"beta1": group["beta1"], "beta2": group["beta2"]}
        # Added to the corrected root, as in torch's AdamW.
        epsilon = group["epsilon"] * math.sqrt(1 - group["beta2"] ** step)
        direction = moments.direction(state, gradient, **betas, epsilon=epsilon, eight_bit=True)
        tensor.mul_(1 - group["lr"] * group["weight_decay"])
        tensor.sub_(direction, alpha=group["lr"] * moments.correction(step, **betas))
