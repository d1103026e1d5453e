"""Saving beside the work: one at a time, tried again, and never silent."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch

from luthier.core.errors import CorruptError, DiskFullError, NumericError, StorageError
from luthier.train.saving import RETRIES, Saver
from luthier.train.state import Snapshot

PAUSE = 0.005


def snapshot(step: int) -> Snapshot:
    return Snapshot(step, {"w": torch.ones(2)}, {"loop": {}})


class Disk:
    """Notes what is written; fails with `errors` in turn, and writes only while `open` is set."""

    def __init__(self, *errors: BaseException) -> None:
        self.errors = list(errors)
        self.written: list[tuple[int, bool]] = []
        self.tries = 0
        self.open = threading.Event()
        self.open.set()

    def __call__(self, taken: Snapshot, best: bool) -> None:
        self.open.wait(5)
        self.tries += 1
        if self.errors:
            raise self.errors.pop(0)
        self.written.append((taken.step, best))


def until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_training_goes_on_while_a_save_is_written_and_the_next_one_waits() -> None:
    """Breaks when saving blocks the loop, or two saves are in flight at once."""
    disk = Disk()
    disk.open.clear()
    saver = Saver(disk, first_pause=PAUSE)
    assert saver.start(snapshot(1), best=False)
    assert saver.poll() == [] and disk.written == []
    later = threading.Thread(target=saver.start, args=(snapshot(2),), kwargs={"best": True})
    later.start()
    later.join(0.05)
    assert later.is_alive() and disk.written == []
    disk.open.set()
    later.join(5)
    assert [(event.kind, event.step, event.values["best"]) for event in saver.finish()] == [
        ("checkpoint", 1, False),
        ("checkpoint", 2, True),
    ]
    assert disk.written == [(1, False), (2, True)]


def test_a_full_disk_is_tried_again_for_as_long_as_there_is_work() -> None:
    """Breaks when a full disk ends a run, is not told, or gives up after some tries."""
    disk = Disk(*[DiskFullError(f"full {number}") for number in range(3 * RETRIES)])
    saver = Saver(disk, first_pause=0.0001)
    saver.start(snapshot(1), best=False)
    until(lambda: bool(disk.written))
    events = saver.finish()
    assert [event.kind for event in events] == ["save_failed"] * 3 * RETRIES + ["checkpoint"]
    assert events[0].values["reason"].startswith("full 0") and events[1].values["retry_in_seconds"] == 0.0002


def test_a_newer_state_takes_the_place_of_one_that_waits_unless_that_is_the_best() -> None:
    """Breaks when the best state is lost because a later, worse one came while the disk was full."""
    disk = Disk(*[DiskFullError("full")] * 2)
    saver = Saver(disk, first_pause=60)
    saver.start(snapshot(1), best=False)
    until(lambda: disk.tries == 1)
    assert saver.start(snapshot(2), best=True)
    until(lambda: disk.tries == 2)
    assert not saver.start(snapshot(3), best=False)
    assert disk.written == []
    saver.finish()
    assert disk.written == [(2, True)]


def test_the_end_insists_and_then_says_so() -> None:
    """Breaks when a run waits for ever at its end, or ends as if it were saved."""
    disk = Disk(*[DiskFullError("full")] * 100)
    saver = Saver(disk, first_pause=PAUSE)
    saver.start(snapshot(1), best=False)
    until(lambda: disk.tries >= 1)
    before = disk.tries
    with pytest.raises(DiskFullError):
        saver.finish()
    assert disk.tries <= before + 1 + RETRIES and disk.written == []
    assert saver.poll()[-1].values["retry_in_seconds"] is None and saver.finish() == []


@pytest.mark.parametrize("error", [StorageError("input/output error"), CorruptError("read back wrong")])
def test_other_failures_are_tried_a_few_times_and_surface_at_a_later_step(error: StorageError) -> None:
    """Breaks when a broken disk is never heard of, or the first hiccup ends a run."""
    disk = Disk(*[error] * 100)
    saver = Saver(disk, first_pause=PAUSE)
    saver.start(snapshot(1), best=False)
    until(lambda: disk.tries == RETRIES + 1)
    with pytest.raises(type(error), match=error.received):
        until(lambda: bool(saver.poll()) and False)
    again = Disk(error)
    saver = Saver(again, first_pause=PAUSE)
    saver.start(snapshot(1), best=False)
    assert [event.kind for event in saver.finish()] == ["save_failed", "checkpoint"]


def test_what_is_no_matter_of_storage_surfaces_at_once() -> None:
    """Breaks when a state that is not finite, or a defect of ours, is tried again or swallowed."""
    for error in (NumericError("not finite"), ZeroDivisionError("a defect")):
        disk = Disk(error)
        saver = Saver(disk, first_pause=PAUSE)
        saver.start(snapshot(1), best=False)
        with pytest.raises(type(error)):
            saver.finish()
        assert disk.tries == 1


def test_a_snapshot_of_live_tensors_is_never_written_later() -> None:
    """Breaks when training would change what a retry writes."""
    disk = Disk(DiskFullError("full"))
    saver = Saver(disk, first_pause=60)
    assert saver.write_now(snapshot(1), best=False)
    assert disk.tries == 1 and disk.written == []
    assert [event.kind for event in saver.finish()] == ["save_failed"]
    assert saver.write_now(snapshot(2), best=False) and disk.written == [(2, False)]


def test_abandoning_leaves_a_waiting_save_at_once() -> None:
    """Breaks when a run that fails hangs on its disk."""
    disk = Disk(DiskFullError("full"))
    saver = Saver(disk, first_pause=60)
    saver.start(snapshot(1), best=False)
    until(lambda: disk.tries == 1)
    began = time.monotonic()
    saver.abandon(seconds=30)
    assert time.monotonic() - began < 5 and disk.written == []
