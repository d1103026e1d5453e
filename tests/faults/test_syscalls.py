"""A checkpoint save broken at some of its system calls; `make faults` breaks it at each of them."""

from __future__ import annotations

from pathlib import Path

from tests.faults import syscalls
from tests.faults.conftest import available

SEED = 1


def test_a_save_killed_at_a_system_call_leaves_a_verified_checkpoint(tmp_path: Path) -> None:
    """Breaks when something is removed, or takes its name, before what replaces it is durable."""
    available(lambda: syscalls.run(10, seed=SEED, folder=tmp_path)).must_hold()


def test_a_failing_system_call_is_a_storage_error(tmp_path: Path) -> None:
    """Breaks when a call is made outside of what explains its failure, or a failure harms an older checkpoint."""
    available(lambda: syscalls.run_errors(14, seed=SEED, folder=tmp_path)).must_hold()


def test_a_run_killed_at_a_system_call_is_finished_by_the_same_command(faults: Path) -> None:
    """Breaks when a run directory has a state that no command goes on from."""
    available(lambda: syscalls.run_whole(2, seed=SEED, folder=faults)).must_hold()


def test_a_save_that_makes_room_first_and_one_that_hides_errors_are_noticed(tmp_path: Path) -> None:
    """Breaks when the campaigns cannot fail."""
    work, points = "save_after_removing", syscalls.kill_points
    broken = available(lambda: syscalls.campaign("broken", "", points, 6, seed=SEED, folder=tmp_path, work=work))
    broken.must_fail()
