"""Runs on disks that are too small, a few: `make faults` tries fifty sizes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import full_disks
from tests.faults.conftest import available

SEED = 1


def test_a_full_disk_loses_nothing_and_the_same_command_goes_on(faults: Path) -> None:
    """Breaks when a full disk ends training, or leaves what the same command does not go on from."""
    available(lambda: full_disks.run(3, seed=SEED, folder=faults)).must_hold()


@pytest.mark.slow
def test_checkpoints_in_place_are_noticed(faults: Path) -> None:
    """Breaks when the campaign cannot fail."""
    available(lambda: full_disks.control(seed=SEED, folder=faults)).must_fail()
    available(lambda: full_disks.control_inodes(seed=SEED, folder=faults)).must_fail()
