"""NF4: four bits a weight, with levels where normal numbers lie, and scales in eight bits.

Idea: trained weights are nearly normal. Sixteen levels at the quantiles of a normal distribution, scaled to the largest
of 64 neighbours, lose little; the scales, one for 64 weights, are quantized themselves (double quantization).
Equation: w ~ s_b level[c], s_b = max |w| of the block; s_b ~ t_g map[q] + mean(s), one t for 256 scales.
Source: Dettmers et al., arXiv 2305.14314, section 3. Codes, scales and their order are those of bitsandbytes: blocks
    run through the flattened matrix, the first of two codes is the high half of a byte, the reciprocal is multiplied.
Cost: 4 + 8/64 + 32/(64 x 256) = 4.127 bits a weight (4.5 without double quantization); unpacking for each product.
Use when: the base does not fit otherwise: with LoRA on all linear layers and paged AdamW it is QLoRA.
Not when: it fits in bfloat16: unpacking costs time, and what is lost is lost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Final, Literal, final

import torch
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor

from luthier.kernels.backend import Backend
from luthier.maths import codebooks
from luthier.model.packed import Packing
from luthier.quantizers import Quantizer

SCALES: Final = 256
"""Scales that share a scale of their own."""


@final
class NF4(Quantizer):
    """Sixteen levels of a normal distribution, in blocks."""

    provides: ClassVar[frozenset[str]] = frozenset({"packed-weights"})

    block: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = Field(64, description="weights that share a scale")
    double: bool = Field(True, description="keep the scales in eight bits too")

    def pack(self, weight: Float[Tensor, "out in"], backend: Backend) -> Packing | None:
        flat = weight.reshape(-1).float()
        codes, scales = nf4_codes(flat, self.block)
        halves = torch.cat([codes, codes.new_full((len(codes) % 2,), _ZERO)]).view(-1, 2)
        packed = (halves[:, 0] << 4) | halves[:, 1]
        shape = (weight.shape[0], weight.shape[1])
        if not self.double:
            return NF4Packing(shape, packed, scales, None, None, None, self.block, backend)
        mean = scales.mean()
        levels = codebooks.table(codebooks.dynamic_levels(signed=True), scales.device)
        scale_codes, scale_scales = codebooks.packed(scales - mean, levels, SCALES)
        return NF4Packing(shape, packed, None, scale_codes, scale_scales, mean, self.block, backend)

    def packed_bytes(self, shape: tuple[int, int]) -> int | None:
        numbers = math.prod(shape)
        blocks = math.ceil(numbers / self.block)
        scales = blocks + 4 * math.ceil(blocks / SCALES) + 4 if self.double else 4 * blocks
        return math.ceil(numbers / 2) + scales


@final
@dataclass(frozen=True)
class NF4Packing(Packing):
    """Codes in pairs, and the scales either as they are or as codes with scales and a mean."""

    codes: UInt8[Tensor, " pairs"]
    scales: Float[Tensor, " blocks"] | None
    scale_codes: UInt8[Tensor, " blocks"] | None
    scale_scales: Float[Tensor, " groups"] | None
    scale_mean: Float[Tensor, ""] | None
    block: int
    backend: Backend

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        levels = codebooks.table(codebooks.NF4, self.codes.device)
        flat = self.backend.unpacked(self.codes, self.block_scales(), levels, self.block, math.prod(self.shape), dtype)
        return flat.view(self.shape)

    def block_scales(self) -> Float[Tensor, " blocks"]:
        """The scale of each block, in float32."""
        if self.scales is not None:
            return self.scales
        if self.scale_codes is None or self.scale_scales is None or self.scale_mean is None:
            raise ValueError("a packing with neither scales nor codes of scales")
        levels = codebooks.table(codebooks.dynamic_levels(signed=True), self.codes.device)
        return codebooks.unpacked(self.scale_codes, self.scale_scales, levels, SCALES) + self.scale_mean


_ZERO: Final = codebooks.NF4.index(0.0)


def nf4_codes(flat: Float[Tensor, " n"], block: int) -> tuple[UInt8[Tensor, " n"], Float[Tensor, " blocks"]]:
    """Codes and the scale of each block, to the bit what bitsandbytes makes of these numbers in float32."""
    levels = codebooks.table(codebooks.NF4, flat.device)
    whole = len(flat) // block * block
    rows = flat[:whole].view(-1, block)
    scales = rows.abs().amax(1) if len(rows) else flat.new_empty(0)
    shares = (rows * (1 / scales.clamp(min=codebooks.SMALLEST))[:, None]).clamp_(-1, 1)
    codes = codebooks.nearest(shares.view(-1), levels)
    rest = flat[whole:]
    if not len(rest):
        return codes, scales
    # A last block that is not full is divided, and has a scale even if all of it is zero.
    last = rest.abs().max().clamp(min=codebooks.SMALLEST)
    rest_codes = codebooks.nearest((rest / last).clamp_(-1, 1), levels)
    return torch.cat([codes, rest_codes]), torch.cat([scales, last[None]])
