"""The linear schedule."""

from __future__ import annotations

import pytest

from luthier.schedules.linear import Linear


def test_it_falls_in_a_straight_line_to_the_last_step() -> None:
    """Breaks when the line starts late, or the last step is taken at a rate of zero."""
    factors = [Linear(warmup=0.0).factor(step, 4) for step in range(4)]
    assert factors == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_warm_up_meets_the_line_at_the_peak() -> None:
    """Breaks when there is a jump between the two."""
    factors = [Linear(warmup=0.2).factor(step, 10) for step in range(10)]
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert factors[3:] == pytest.approx([7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


def test_the_floor_is_where_it_would_end() -> None:
    """Breaks when the knob is not read, or cuts the line off instead of bending it."""
    assert Linear(warmup=0.0, floor=0.5).factor(2, 4) == pytest.approx(0.75)
    assert Linear(warmup=0.0, floor=0.5).factor(4, 4) == pytest.approx(0.5)
