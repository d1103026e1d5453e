"""Numbers that are not finite put into runs, a few: `make faults` puts hundreds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import bad_numbers

SEED = 1


def test_a_number_that_is_not_finite_is_an_event_and_reaches_no_checkpoint(faults: Path) -> None:
    """Breaks when a bad step is applied, told without tensor or rows, or something that is not finite is saved."""
    kinds = 6
    assert set(bad_numbers.KINDS[:kinds]) == set(bad_numbers.KINDS) - {"evaluation"}
    bad_numbers.run(kinds, seed=SEED, folder=faults).must_hold()


@pytest.mark.slow
def test_every_kind_is_met(faults: Path) -> None:
    """Breaks when one of the places where numbers go bad is not guarded."""
    bad_numbers.run(2 * len(bad_numbers.KINDS), seed=SEED + 1, folder=faults).must_hold()


def test_a_stepper_that_applies_what_is_not_finite_is_noticed(faults: Path) -> None:
    """Breaks when nothing that matters is spoilt."""
    bad_numbers.control(seed=SEED, folder=faults).must_fail()
