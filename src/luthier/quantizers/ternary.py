"""Ternary: -1, 0 or 1 times one scale for the matrix.

Idea: a weight says only for, against or nothing. A model has to be trained for that; one that was not is damaged badly,
and a test of what adapters can mend.
Equation: s = mean |W|, q = clip(round(W / s), -1, 1), w ~ s q.
Source: Ma et al., arXiv 2402.17764, section 2 (absmean quantization, BitNet b1.58).
Cost: 2 bits a weight as it is kept here, four to a byte (log2 3 = 1.58 would do); unpacking for each product.
Use when: the model was trained with ternary weights.
Not when: it was not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from luthier.kernels.backend import Backend
from luthier.maths.codebooks import in_blocks
from luthier.model.packed import Packing
from luthier.quantizers import Quantizer


@final
class Ternary(Quantizer):
    """Three levels, one scale."""

    provides: ClassVar[frozenset[str]] = frozenset({"packed-weights"})

    def pack(self, weight: Float[Tensor, "out in"], backend: Backend) -> Packing | None:
        wide = weight.reshape(-1).float()
        scale = wide.abs().mean()
        signs = (wide / torch.where(scale > 0, scale, 1.0)).round_().clamp_(-1, 1)
        fours = in_blocks(signs, 4).to(torch.int16) + 1
        codes = fours[:, 0] | (fours[:, 1] << 2) | (fours[:, 2] << 4) | (fours[:, 3] << 6)
        return TernaryPacking((weight.shape[0], weight.shape[1]), codes.to(torch.uint8), scale)

    def packed_bytes(self, shape: tuple[int, int]) -> int | None:
        return math.ceil(math.prod(shape) / 4) + 4


@final
@dataclass(frozen=True)
class TernaryPacking(Packing):
    """Signs, four to a byte, the first of them in the lowest bits; one scale."""

    codes: UInt8[Tensor, " fours"]
    scale: Float[Tensor, ""]

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        # The four signs of every byte there is, times the scale, looked up.
        every = torch.arange(256, device=self.codes.device)
        signs = torch.stack([(every >> shift & 3) - 1 for shift in (0, 2, 4, 6)], 1)
        found = (signs * self.scale).to(dtype)[self.codes.int()]
        return found.view(-1)[: math.prod(self.shape)].view(self.shape)
