"""Products of many rows in bfloat16, or with weights of eight bits, on a CPU without instructions for them.

Idea: such a CPU takes the library's product of bfloat16 number by number, many times as long as one of floats. Weights
that are widened a piece at a time cost one more pass over them, and the product is one of floats; what is kept
in memory stays half as large, which is what a few rows are read from.
Cost: 4 MB of floats; one pass over the weight.
Use when: rows are too many for the kernels of few rows. Not when: the CPU has AVX512-BF16 or AMX.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from jaxtyping import Float, Int8, Shaped
from torch import Tensor
from torch.nn import functional as F

_PIECE: Final = 1 << 20
"""Numbers of a weight that are widened at once."""


def multiplies_halves() -> bool:
    """Whether this CPU has instructions for products of bfloat16 numbers."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def product_of_many(
    x: Float[Tensor, "n in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "n out"]:
    """x W^T + b, added up in float32 and rounded once."""
    found, wide = x.new_empty(len(x), len(weight)), x.float()
    for own in _pieces(weight):
        found[:, own] = F.linear(wide, weight[own].float(), None if bias is None else bias[own].float())
    return found


def product_of_many_bytes(
    x: Float[Tensor, "n in"], codes: Int8[Tensor, "out in"], scales: Float[Tensor, " out"]
) -> Float[Tensor, "n out"]:
    """x W^T for a weight of whole numbers with a scale for each row of it, rounded once."""
    found, wide = x.new_empty(len(x), len(codes)), x.float()
    for own in _pieces(codes):
        found[:, own] = F.linear(wide, codes[own].float()).mul_(scales[own])
    return found


def _pieces(weight: Shaped[Tensor, "out in"]) -> Iterator[slice]:
    """Rows that are widened at once."""
    outs, size = weight.shape
    height = max(1, _PIECE // max(1, size))
    for first in range(0, outs, height):
        yield slice(first, first + height)
