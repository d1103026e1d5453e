"""The constant schedule and the warm-up that all schedules share."""

from __future__ import annotations

import pytest

from luthier.schedules.constant import Constant


def test_without_warm_up_every_step_is_at_the_peak() -> None:
    """Breaks when the first step is wasted at a rate of zero."""
    assert [Constant().factor(step, 5) for step in range(5)] == [1.0] * 5


def test_warm_up_rises_evenly_and_reaches_the_peak_right_after_it() -> None:
    """Breaks when warm-up is off by a step."""
    factors = [Constant(warmup=0.3).factor(step, 10) for step in range(10)]
    assert factors[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0]) and factors[4:] == [1.0] * 6
