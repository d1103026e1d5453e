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

import numpy as np
from jaxtyping import Float, Int

DRAWERS: Final = 1 << 15
_HALF: Final = 16
_LOW: Final = (1 << _HALF) - 1


def drawer_counts(numbers: Float[np.ndarray, "*shape"]) -> Int[np.ndarray, " D"]:
    """How many magnitudes have each upper half."""
    return np.bincount(_bits(numbers) >> _HALF, minlength=DRAWERS)


def inner_counts(numbers: Float[np.ndarray, "*shape"], drawer: int) -> Int[np.ndarray, " L"]:
    """How many of the magnitudes in one drawer have each lower half."""
    bits = _bits(numbers)
    return np.bincount(bits[(bits >> _HALF) == drawer] & _LOW, minlength=_LOW + 1)


def drawer_of(counts: Int[np.ndarray, " D"], k: int) -> tuple[int, int]:
    """The place that holds the k-th largest (k from 1 on), and which of its own it is, counted from the largest."""
    from_top = counts[::-1].cumsum()
    place = int(np.searchsorted(from_top, k))
    before = int(from_top[place - 1]) if place else 0
    return len(counts) - 1 - place, k - before


def kth_largest(counts: Int[np.ndarray, " D"], inner: Int[np.ndarray, " L"], k: int) -> float:
    """The k-th largest magnitude, from the counts of both looks; for k = 0 what nothing reaches."""
    if k <= 0:
        return float("inf")
    drawer, rest = drawer_of(counts, k)
    low, _ = drawer_of(inner, rest)
    return float(np.int32(drawer << _HALF | low).view(np.float32))


def _bits(numbers: Float[np.ndarray, "*shape"]) -> Int[np.ndarray, " n"]:
    return np.abs(numbers.reshape(-1)).view(np.int32)
