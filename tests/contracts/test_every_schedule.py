"""What every schedule of the catalog promises."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.core import catalog
from luthier.core.chosen import choose
from luthier.schedules import Schedule
from tests.contracts.resumption import Setup, assert_resumes

each = pytest.mark.parametrize("name", catalog.names("schedules"))


@each
@pytest.mark.parametrize("total", [1, 2, 3, 10, 1000])
def test_every_step_of_a_run_has_a_factor_above_zero_and_at_most_one(name: str, total: int) -> None:
    """Breaks when a short run divides by zero, or a step changes nothing."""
    method = choose("schedules", Schedule, name)
    factors = [method.factor(step, total) for step in range(total)]
    assert all(0 < factor <= 1 for factor in factors)
    assert max(factors) == pytest.approx(1.0)


@each
def test_the_factor_depends_on_the_step_and_the_length_alone(name: str) -> None:
    """Breaks when a schedule remembers where it was: a resumed run would differ."""
    one, two = choose("schedules", Schedule, name), choose("schedules", Schedule, name)
    for step in range(50):
        one.factor(step, 50)
    assert [one.factor(step, 50) for step in (30, 3)] == [two.factor(step, 50) for step in (30, 3)]


@each
def test_warm_up_is_a_share_of_the_run(name: str) -> None:
    """Breaks when the knob is not read."""
    method = choose("schedules", Schedule, {"method": name, "warmup": 0.5})
    factors = [method.factor(step, 20) for step in range(11)]
    assert factors == sorted(factors) and factors[10] == pytest.approx(1.0) and factors[0] == pytest.approx(1 / 11)


@each
def test_a_run_that_is_interrupted_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Breaks when the rate of a resumed run begins anew."""
    assert_resumes(Setup(schedule={"method": name, "warmup": 0.4}), tmp_path)
