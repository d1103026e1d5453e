"""The cosine schedule."""

from __future__ import annotations

import pytest

from luthier.schedules.cosine import Cosine


def test_it_follows_half_a_cosine() -> None:
    """Breaks when the period is not the length of the run."""
    factors = [Cosine(warmup=0.0).factor(step, 4) for step in range(5)]
    assert factors == pytest.approx([1.0, 0.8535534, 0.5, 0.1464466, 0.0])


def test_warm_up_meets_the_curve_at_the_peak() -> None:
    """Breaks when there is a jump between the two."""
    factors = [Cosine(warmup=0.2).factor(step, 10) for step in range(4)]
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1.0]) and factors[3] < 1


def test_the_floor_is_where_it_ends() -> None:
    """Breaks when the knob is not read."""
    assert Cosine(warmup=0.0, floor=0.1).factor(10, 10) == pytest.approx(0.1)
    assert Cosine(warmup=0.0, floor=0.1).factor(5, 10) == pytest.approx(0.55)
