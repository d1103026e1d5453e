"""Races for one run directory, a few: `make faults` holds hundreds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import locks

SEED = 1


def test_one_of_several_starts_trains_and_the_others_name_it(faults: Path) -> None:
    """Breaks when two processes write into one run, or a refused one does not say by whom it is used."""
    locks.run(locks.RACERS, seed=SEED, folder=faults).must_hold()


def test_one_of_many_processes_gets_the_lock(tmp_path: Path) -> None:
    """Breaks when there is a moment in which two processes may both take a run, or one that is refused changes it."""
    locks.run_store(locks.CROWD, seed=SEED, folder=tmp_path).must_hold()


def test_a_lock_that_locks_nothing_is_noticed(tmp_path: Path) -> None:
    """Breaks when the race is none."""
    locks.control_store(seed=SEED, folder=tmp_path).must_fail()


def test_a_finished_run_stays_as_it_is(faults: Path) -> None:
    """Breaks when a command writes into a run that is finished."""
    locks.run_finished(3, seed=SEED, folder=faults).must_hold()


@pytest.mark.slow
def test_broken_variants_are_noticed(faults: Path) -> None:
    """Breaks when the campaigns cannot fail."""
    locks.control(seed=SEED, folder=faults).must_fail()
    locks.control_finished(seed=SEED, folder=faults).must_fail()
