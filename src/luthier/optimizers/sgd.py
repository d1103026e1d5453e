"""SGD: a step against the gradient, with momentum if asked for.

Idea: the plainest step there is; what an adaptive method gains is measured against it.
Equation: m = mu m + g, theta = theta - lr (g + mu m if nesterov, else m), with g = gradient + decay theta.
Source: Sutskever et al., ICML 2013, "On the importance of initialization and momentum in deep learning"; torch's form.
Cost: 4 bytes of state a parameter, none with momentum 0.
Use when: memory allows no moments, or a method's arithmetic shall be seen without Adam in the way.
Not when: in doubt. Transformers train badly by it: gradients of their parts differ by orders of magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import final

from pydantic import Field
from torch import Tensor, optim
from torch.optim import Optimizer as TorchOptimizer

from luthier.optimizers import Optimizer, decay_groups


@final
class SGD(Optimizer):
    """Gradient descent with momentum."""

    learning_rate: float = Field(1.0e-2, gt=0, description="peak learning rate")
    momentum: float = Field(0.9, ge=0, lt=1, description="share of the last step that is made again; 0 keeps no state")
    nesterov: bool = Field(False, description="look ahead by the momentum before stepping; needs momentum")
    weight_decay: float = Field(0.0, ge=0, description="decay of matrices, through the gradient; vectors never decay")

    @property
    def peak_learning_rate(self) -> float:
        return self.learning_rate

    def build(self, parameters: Mapping[str, Tensor]) -> TorchOptimizer:
        return optim.SGD(
            decay_groups(parameters, self.weight_decay),
            lr=self.learning_rate,
            momentum=self.momentum,
            nesterov=self.nesterov and self.momentum > 0,
        )

    def state_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        return 4 * sum(map(math.prod, shapes.values())) if self.momentum else 0
