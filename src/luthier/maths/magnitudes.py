"""The k-th largest magnitude of numbers that are never all in memory, exactly, from two looks at them.

Idea: the bits of a float32 without its sign are a whole number that grows with the magnitude. The first look counts the
upper half of these bits, which says in which of 32,768 drawers the k-th largest lies; the second counts the lower half
within that drawer. Counts add, so the numbers may come in any pieces and order.
Equation: threshold t = the k-th largest of |x_i|; kept are |x_i| >= t, so at least k.
Source: radix selection; Knuth, "The Art of Computer Programming", volume 3, section 5.2.5.
Cost: 256 KB of counts for the first look and 512 KB for the second.
"""

from __future__ import annotations

from typing import Final

import torch
from jaxtyping import Float, Int
from torch import Tensor

DRAWERS: Final = 1 << 15
_HALF: Final = 16
_LOW: Final = (1 << _HALF) - 1


def drawer_counts(numbers: Float[Tensor, "*shape"]) -> Int[Tensor, " D"]:
    """How many magnitudes have each upper half."""
    return torch.bincount(_bits(numbers) >> _HALF, minlength=DRAWERS)


def inner_counts(numbers: Float[Tensor, "*shape"], drawer: int) -> Int[Tensor, " L"]:
    """How many of the magnitudes in one drawer have each lower half."""
    bits = _bits(numbers)
    return torch.bincount(bits[(bits >> _HALF) == drawer] & _LOW, minlength=_LOW + 1)


def drawer_of(counts: Int[Tensor, " D"], k: int) -> tuple[int, int]:
    """The place that holds the k-th largest (k from 1 on), and which of its own it is, counted from the largest."""
    from_top = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, k))
    before = int(from_top[place - 1]) if place else 0
    return len(counts) - 1 - place, k - before


def kth_largest(counts: Int[Tensor, " D"], inner: Int[Tensor, " L"], k: int) -> float:
    """The k-th largest magnitude, from the counts of both looks; for k = 0 what nothing reaches."""
    if k <= 0:
        return float("inf")
    drawer, rest = drawer_of(counts, k)
    low, _ = drawer_of(inner, rest)
    return float(torch.tensor(drawer << _HALF | low, dtype=torch.int32).view(torch.float32))


def _bits(numbers: Float[Tensor, "*shape"]) -> Int[Tensor, " n"]:
    return numbers.reshape(-1).abs().view(torch.int32)
