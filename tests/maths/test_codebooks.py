"""Codebooks: tables, ties, blocks, and bitsandbytes as oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from luthier.maths.codebooks import NF4, dynamic_levels, nearest, packed, table, unpacked

CPU = torch.device("cpu")
bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is the oracle")


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_map_is_that_of_bitsandbytes(signed: bool) -> None:
    """Breaks when a decade has the wrong number of levels, or a level is off by a bit."""
    theirs = bitsandbytes.functional.create_dynamic_map(signed=signed)
    assert torch.equal(table(dynamic_levels(signed=signed), CPU), theirs)


def test_nf4_is_the_table_of_bitsandbytes() -> None:
    """Breaks when a level is computed instead of copied."""
    assert torch.equal(table(NF4, CPU), bitsandbytes.functional.get_4bit_type("nf4", device="cpu"))


def test_the_nearest_level_is_brute_force_and_ties_go_down() -> None:
    """Breaks when midpoints are off, or a tie goes to the upper level."""
    levels = table(dynamic_levels(signed=True), CPU)
    values = torch.rand(5000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    brute = (values[:, None].double() - levels.double()).abs().argmin(1)
    found = nearest(values, levels)
    off = (values.double() - levels[found.int()].double()).abs() - (values.double() - levels[brute].double()).abs()
    # Midpoints are float32: between two levels that are nearly equally near either may be taken.
    assert float(off.max()) < 1e-7
    assert nearest(torch.tensor([0.5]), torch.tensor([0.0, 1.0])).tolist() == [0]


@given(size=st.integers(0, 70), block=st.integers(1, 20))
def test_blocks_have_their_own_scale(size: int, block: int) -> None:
    """Breaks when a scale reaches into the next block, or the last block is filled with something that counts."""
    values = torch.randn(size, generator=torch.Generator().manual_seed(size)) * torch.arange(1, size + 1)
    levels = table(dynamic_levels(signed=True), CPU)
    codes, scales = packed(values, levels, block)
    assert codes.shape == values.shape and len(scales) == -(-size // block)
    for index, scale in enumerate(scales):
        assert scale == values[index * block : (index + 1) * block].abs().max()
    back = unpacked(codes, scales, levels, block)
    bound = scales.repeat_interleave(block)[:size] * 0.0079
    assert bool(((back - values).abs() <= bound).all())


def test_zeros_stay_zeros() -> None:
    """Breaks when an empty block divides by nothing."""
    levels = table(NF4, CPU)
    codes, scales = packed(torch.zeros(100), levels, 64)
    assert torch.equal(unpacked(codes, scales, levels, 64), torch.zeros(100))
