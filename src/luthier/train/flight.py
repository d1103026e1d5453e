"""A flight: one piece of work under way in a thread of its own, whose result is asked for later.

Idea: an engine somewhere else works while steps are taken here, and all that has to be done here for it is to wait. So
one thread waits, for one rollout: there is never a second one under way. What it fails with is raised where the result
is asked for. Nobody waits for the thread at the end of the process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar, final

from luthier.core.waiting import Waits

T = TypeVar("T")


@final
class Flight(Generic[T]):
    """Does `work` beside; the waiting for its result is that of `waits`."""

    def __init__(self, work: Callable[[], T], waits: Waits) -> None:
        self._waits = waits
        self._over = threading.Event()
        self._found: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), name="luthier-rollout", daemon=True)
        self._thread.start()

    def result(self) -> T:
        """What came of it. Raises what it has failed with, and StoppedError when the run is to stop meanwhile."""
        self._waits.until(self._over.wait)
        if self._error is not None:
            raise self._error
        return self._found[0]

    def join(self, seconds: float) -> None:
        """Give it so long to end."""
        self._thread.join(seconds)

    def _run(self, work: Callable[[], T]) -> None:
        try:
            self._found.append(work())
        except BaseException as error:  # noqa: BLE001 (it is raised again where the result is asked for)
            self._error = error
        self._over.set()
