"""Processes that chat templates run in, handed on from test to test: starting one takes as long as a small test.

What ends one for a template leaves it idle here, and whoever would start one takes an idle one. Templates see nothing
of each other there: each is asked for by a digest of itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import final

import pytest

from luthier.data.rendering import process


@final
class Idle:
    """Processes that nobody uses."""

    def __init__(self, start: Callable[[], process._Worker]) -> None:
        self.start = start
        self._waiting: list[tuple[process._Worker, Callable[[], None]]] = []
        self._open = True

    def taken(self) -> process._Worker:
        """One that waits here, or a new one; it comes back when it is to be stopped."""
        while self._waiting:
            worker, stop = self._waiting.pop()
            if worker.usable:
                break
            stop()
        else:
            worker = self.start()
            stop = worker.stop
        worker.stop = partial(self._back, worker, stop)  # type: ignore[method-assign]
        return worker

    def _back(self, worker: process._Worker, stop: Callable[[], None]) -> None:
        if self._open and worker.usable:
            self._waiting.append((worker, stop))
        else:
            stop()

    def close(self) -> None:
        """Stop all that wait, and from now on those that come back."""
        self._open = False
        while self._waiting:
            self._waiting.pop()[1]()


@contextmanager
def handed_on() -> Iterator[Idle]:
    """Hand processes on, inside the `with`."""
    idle = Idle(process._Worker)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "_Worker", idle.taken)
        yield idle
    idle.close()
