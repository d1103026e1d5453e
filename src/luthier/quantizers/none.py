"""No quantizer: weights stay as they are.

Idea: the base model's weights are kept in the precision it computes in, two bytes a number in bfloat16 and four in
float32.
Equation: W = W.
Source: none; it is what every other quantizer is measured against.
Cost: 16 or 32 bits a parameter.
Use when: the weights fit.
Not when: they do not.
"""

from __future__ import annotations

from typing import final

from jaxtyping import Float
from torch import Tensor

from luthier.kernels.backend import Backend
from luthier.model.packed import Packing
from luthier.quantizers import Quantizer


@final
class Unpacked(Quantizer):
    """Weights in the model's own precision."""

    def pack(self, weight: Float[Tensor, "out in"], backend: Backend) -> Packing | None:
        return None

    def packed_bytes(self, shape: tuple[int, int]) -> int | None:
        return None
