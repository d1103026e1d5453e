"""Codebooks: a few levels that stand for real numbers, and blocks of numbers that share a scale.

Idea: numbers are divided by the largest of their block, and each becomes the index of the nearest of a few levels in
[-1, 1]. Levels lie densely where the numbers do: NF4's follow the quantiles of a normal distribution, the dynamic map
spreads 254 of them over seven decades.
Equation: code_i = #{midpoints < x_i / s}, x_i ~ s level[code_i], s = max |x| of the block.
Source: NF4: Dettmers et al., arXiv 2305.14314, section 3, its table as in bitsandbytes (a table that is computed anew
    differs in the last bits); dynamic map: Dettmers et al., arXiv 2110.02861, section 2.2 (dynamic tree quantization).
"""

from __future__ import annotations

from functools import cache
from typing import Final

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

NF4: Final = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The sixteen levels of NF4, by code."""

DECADES: Final = 7
"""Powers of ten over which the dynamic map spreads its levels."""
SMALLEST: Final = 1e-38
"""What a scale is at least: a block of zeros stays one."""


@cache
def dynamic_levels(*, signed: bool) -> tuple[float, ...]:
    """The 256 levels of the dynamic map, ascending: in [-1, 1] if `signed`, else in [0, 1].

    A decade has twice as many levels as the one below it, in the middle of equal parts; zero and one are levels too.
    """
    levels = [0.0, 1.0]
    for decade in range(DECADES):
        parts = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1, parts + 1)
        # In float32, as in bitsandbytes: its tables are what files were written with.
        own = (10.0 ** (decade - DECADES + 1) * ((edges[:-1] + edges[1:]) / 2.0)).tolist()
        levels += own + [-level for level in own if signed]
    return tuple(sorted(levels))


@cache
def table(levels: tuple[float, ...], device: torch.device) -> Float[Tensor, " levels"]:
    """The levels as a tensor, which is the same one each time: it is for reading."""
    with torch.inference_mode(mode=False):
        return torch.tensor(levels, device=device)


def nearest(values: Float[Tensor, "*shape"], levels: Float[Tensor, " levels"]) -> UInt8[Tensor, "*shape"]:
    """The index of the nearest level; a value in the middle of two gets the lower one."""
    middles = (levels[:-1] + levels[1:]) / 2
    return torch.bucketize(values, middles, out_int32=True).to(torch.uint8)


def in_blocks(values: Float[Tensor, " n"], block: int) -> Float[Tensor, "blocks block"]:
    """Values in rows of `block`; the last one is filled up with zeros."""
    missing = -len(values) % block
    padded = torch.cat([values, values.new_zeros(missing)]) if missing else values
    return padded.view(-1, block)


def packed(
    values: Float[Tensor, " n"], levels: Float[Tensor, " levels"], block: int
) -> tuple[UInt8[Tensor, " n"], Float[Tensor, " blocks"]]:
    """Codes and the scale of each block, in float32."""
    rows = in_blocks(values, block)
    scales = rows.abs().amax(1)
    codes = nearest(rows * (1 / scales.clamp(min=SMALLEST))[:, None], levels)
    return codes.view(-1)[: len(values)], scales


def unpacked(
    codes: UInt8[Tensor, " n"], scales: Float[Tensor, " blocks"], levels: Float[Tensor, " levels"], block: int
) -> Float[Tensor, " n"]:
    """The numbers that codes and scales stand for."""
    values = in_blocks(levels.index_select(0, codes.int()), block) * scales[:, None]
    return values.view(-1)[: len(codes)]
