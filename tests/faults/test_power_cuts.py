"""Power cuts while checkpoints are saved, a few: `make faults` makes hundreds."""

from __future__ import annotations

from pathlib import Path

from tests.faults import power_cuts
from tests.faults.conftest import available

SEED = 1


def test_what_was_announced_survives_a_power_cut(tmp_path: Path) -> None:
    """Breaks when a file, a name or a folder is not flushed before the checkpoint is announced."""
    available(lambda: power_cuts.run(4, seed=SEED, folder=tmp_path)).must_hold()


def test_a_disk_that_never_flushes_is_noticed(tmp_path: Path) -> None:
    """Breaks when the copies do not show what a power cut would leave: then the test above shows nothing."""
    broken = available(lambda: power_cuts.control(seed=SEED, folder=tmp_path)).must_fail()
    assert broken.passed <= 0.8 * broken.tried
