"""The exact k-th largest from counts, against sorting; in pieces as whole."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.maths.magnitudes import drawer_counts, drawer_of, inner_counts, kth_largest

WILD = np.concatenate([
    np.random.default_rng(0).standard_normal(5000),
    [0.0, -0.0, 1e-45, -1e-38, 3e38, -3e38, 1.0, -1.0, 1.0],
]).astype(np.float32)  # fmt: skip


@pytest.mark.parametrize("k", [1, 2, 17, 2500, 5000, 5009])
def test_it_is_what_sorting_finds(k: int) -> None:
    """Breaks when a sign, a subnormal number or a drawer's edge is counted wrongly."""
    pieces = np.array_split(WILD, 7)
    counts = np.sum([drawer_counts(piece) for piece in pieces], 0)
    drawer, _ = drawer_of(counts, k)
    inner = np.sum([inner_counts(piece, drawer) for piece in pieces], 0)
    assert kth_largest(counts, inner, k) == float(np.sort(np.abs(WILD))[-k])


def test_nothing_is_as_large_as_the_zeroth() -> None:
    """Breaks when cutting off none cuts off the largest."""
    counts = drawer_counts(WILD)
    assert kth_largest(counts, inner_counts(WILD, drawer_of(counts, 1)[0]), 0) == float("inf")
