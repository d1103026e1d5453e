"""Runs sent signals at random moments, a few: `make faults` sends hundreds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import signals

SEED = 1


def test_sigterm_saves_and_the_same_command_goes_on(faults: Path) -> None:
    """Breaks when a stop waits for more than its step, says nothing to go on with, or loses a step."""
    signals.run(3, seed=SEED, folder=faults).must_hold()


def test_other_signals_save_too(faults: Path) -> None:
    """Breaks when SIGINT or SIGHUP loses a step, a second SIGINT waits, or a save that was asked for is not made."""
    signals.run_others(len(signals.OTHER_KINDS), seed=SEED, folder=faults).must_hold()


@pytest.mark.slow
def test_a_run_that_does_not_listen_is_noticed(faults: Path) -> None:
    """Breaks when the campaigns cannot fail."""
    signals.control(seed=SEED, folder=faults).must_fail()
    signals.control_others(seed=SEED, folder=faults).must_fail()
