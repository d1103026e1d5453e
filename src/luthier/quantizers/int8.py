"""int8: eight bits a weight, one scale a row.

Idea: each output's weights are divided by a 127th of the largest of them and rounded. Activations stay as they are.
Equation: s_i = max_j |W_ij| / 127, q_ij = round(W_ij / s_i); y = x (s q)^T.
Source: weight-only quantization as surveyed by Weng, "Large Transformer Model Inference Optimization" (2023);
    symmetric, one scale an output as in torchao's int8_weight_only.
Cost: 8 bits a weight and 32 a row; unpacking for each product. The error of a weight is at most s / 2.
Use when: half of bfloat16's memory is enough.
Not when: it is not: nf4 takes half of this again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from luthier.kernels.backend import Backend
from luthier.model.packed import Packing
from luthier.quantizers import Quantizer


@final
class RowInt8(Quantizer):
    """Symmetric, a scale for each output."""

    provides: ClassVar[frozenset[str]] = frozenset({"packed-weights"})

    def pack(self, weight: Float[Tensor, "out in"], backend: Backend) -> Packing | None:
        wide = weight.float()
        scales = wide.abs().amax(1) / 127
        # A row of zeros keeps a scale of zero, and divides by one.
        codes = (wide / torch.where(scales > 0, scales, 1.0)[:, None]).round_().to(torch.int8)
        return Int8Packing((weight.shape[0], weight.shape[1]), codes, scales)

    def packed_bytes(self, shape: tuple[int, int]) -> int | None:
        return shape[0] * shape[1] + 4 * shape[0]


@final
@dataclass(frozen=True)
class Int8Packing(Packing):
    """Codes from -127 to 127, and a scale for each row."""

    codes: Int8[Tensor, "out in"]
    scales: Float[Tensor, " out"]

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        return torch.mul(self.codes, self.scales[:, None]).to(dtype)
