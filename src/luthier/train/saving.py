"""Saving beside the work: one thread writes a snapshot while training goes on, and tries again when it cannot.

Idea: what is saved is copied first, so training may change what it likes. At most one save is in flight; the next one
waits for it. A full disk does not end the work of days: the save is tried again, after 1, 2, 4, ... seconds, for as
long as training goes on, and a newer snapshot takes the place of one that still waits. Every other failure is tried
`RETRIES` times and then surfaces at the next step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final, final

from luthier.core.errors import DiskFullError, StorageError
from luthier.core.events import Event
from luthier.train.state import Snapshot

RETRIES: Final = 3
FIRST_PAUSE: Final = 1.0
LONGEST_PAUSE: Final = 60.0

Write = Callable[[Snapshot, bool], None]


@final
class Saver:
    """Writes snapshots, one at a time, in a thread of its own. `first_pause` is in seconds."""

    def __init__(self, write: Write, *, first_pause: float = FIRST_PAUSE) -> None:
        self._write = write
        self._first_pause = first_pause
        self._job: _Job | None = None
        self._events: list[Event] = []

    def start(self, snapshot: Snapshot, *, best: bool) -> bool:
        """Begin to save `snapshot`; first wait until the one in flight is written.

        False when it is not taken, because a best state still waits for space and this one is not better.
        """
        job = self._job
        if job is not None:
            job.wait_while_writing()
            if not job.over:
                if job.best and not best:
                    return False
                job.give_up()
            self._reap()
        self._job = _Job(snapshot, best, self._write, self._first_pause)
        return True

    def write_now(self, snapshot: Snapshot, *, best: bool) -> bool:
        """Save a snapshot whose tensors are live: when this returns it is written, or nobody will look at it again."""
        if not self.start(snapshot, best=best) or self._job is None:
            return False
        self._job.wait_while_writing()
        if not self._job.over:
            self._job.give_up()
        return True

    def poll(self) -> list[Event]:
        """What has happened since the last call. Raises what a save has failed with for good."""
        job = self._job
        if job is not None:
            self._events += job.take_events()
            if job.over:
                self._reap()
        told, self._events = self._events, []
        return told

    def finish(self) -> list[Event]:
        """Wait until nothing is in flight; a save that fails now is tried `RETRIES` more times.

        Raises StorageError when it is not saved then.
        """
        if self._job is not None:
            self._job.finish()
        return self.poll()

    def abandon(self, *, seconds: float) -> None:
        """Let go of what is in flight: a save being written gets `seconds` to end, one that waits is given up."""
        if self._job is not None:
            self._job.give_up(seconds=seconds)
            self._job = None

    def _reap(self) -> None:
        job, self._job = self._job, None
        if job is None:
            return
        self._events += job.take_events()
        if job.error is not None:
            raise job.error


@final
class _Job:
    """One snapshot on its way to the disk."""

    def __init__(self, snapshot: Snapshot, best: bool, write: Write, first_pause: float) -> None:
        self.snapshot = snapshot
        self.best = best
        self.error: BaseException | None = None
        self._save = write
        self._pause = first_pause
        self._first_pause = first_pause
        self._events: list[Event] = []
        self._state = threading.Condition()
        self._writing = True
        self._over = False
        self._left: int | None = None
        self._given_up = False
        self._others = 0
        # A daemon: a process that is told to leave at once does; a half-written folder is cleared at the next start.
        self._thread = threading.Thread(target=self._run, name="luthier-save", daemon=True)
        self._thread.start()

    @property
    def over(self) -> bool:
        with self._state:
            return self._over

    def take_events(self) -> list[Event]:
        with self._state:
            told, self._events = self._events, []
            return told

    def wait_while_writing(self) -> None:
        with self._state:
            self._state.wait_for(lambda: self._over or not self._writing)

    def finish(self) -> None:
        with self._state:
            self._left, self._pause = RETRIES, self._first_pause
            self._state.notify_all()
        self._thread.join()

    def give_up(self, *, seconds: float | None = None) -> None:
        with self._state:
            self._given_up = True
            self._state.notify_all()
        self._thread.join(seconds)

    def _run(self) -> None:
        try:
            while not self._attempt() and self._wait():
                pass
        except BaseException as error:  # noqa: BLE001 (it is raised again where the loop can hear it)
            self.error = error
        with self._state:
            self._over, self._writing = True, False
            self._state.notify_all()

    def _attempt(self) -> bool:
        """Whether the snapshot is written now; a failure that may pass is told and remembered."""
        with self._state:
            self._writing = True
        try:
            self._save(self.snapshot, self.best)
        except StorageError as error:
            self._others += not isinstance(error, DiskFullError)
            with self._state:
                last = self._left == 0 or self._others > RETRIES
                values = {"reason": error.received, "retry_in_seconds": None if last else self._pause}
                self._events.append(Event("save_failed", values, step=self.snapshot.step))
            if last:
                raise
            return False
        with self._state:
            self._events.append(Event("checkpoint", {"best": self.best}, step=self.snapshot.step))
        return True

    def _wait(self) -> bool:
        """Pause before the next attempt; False when there shall be none."""
        with self._state:
            self._writing = False
            self._state.notify_all()
            before = self._left
            self._state.wait_for(lambda: self._given_up or self._left != before, timeout=self._pause)
            if self._left is not None and self._left == before:
                self._left -= 1
            if self._left is None or self._left == before:
                self._pause = min(2 * self._pause, LONGEST_PAUSE)
            return not self._given_up
