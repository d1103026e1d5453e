"""Waiting for somebody else: a long wait is told once and told to be over, and ends when the run is asked to stop.

Idea: who waits does not know who listens, for an engine is opened before a run has a log; so the listener is bound
later. Threads that wait in the place of the run say why they wait; only the run's own thread tells.
Use when: something outside of this process is waited for: an engine, a judge.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, final

from luthier.core.errors import LuthierError, StoppedError
from luthier.core.events import Event

LONG: Final = 10.0
"""Seconds after which a wait is told."""
_LOOK: Final = 0.2
"""Seconds between two looks at whether somebody has asked to stop."""


@final
class Waits:
    """Waits for `who`. One that takes no more than twice as long as an earlier one is not told: it is no news."""

    def __init__(self, who: str, *, after: float = LONG) -> None:
        self.who = who
        self.after = after
        self._tell: Callable[[Event], None] | None = None
        self._stop: Callable[[], LuthierError | None] = _nobody
        self._owner = 0
        self._ended = threading.Event()
        self._began: float | None = None
        self._told = False
        self._usual = 0.0
        self._reason = ""

    def bind(self, tell: Callable[[Event], None], stop: Callable[[], LuthierError | None]) -> None:
        """Who is told from now on, from this thread only, and what says that nobody shall wait any more."""
        self._tell, self._stop, self._owner = tell, stop, threading.get_ident()

    def end(self) -> None:
        """Whoever waits, in whatever thread, waits no longer."""
        self._ended.set()

    def failed(self, reason: str) -> None:
        """Why it takes longer; empty when that is over."""
        self._reason = reason

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Something that may take long."""
        if self._began is not None or threading.get_ident() != self._owner:
            yield
            return
        self._began, self._told = time.monotonic(), False
        try:
            yield
            waited = time.monotonic() - self._began
            self._usual = max(self._usual, waited)
            self._say(over=True, seconds=waited) if self._told else None
        finally:
            self._began = None

    def look(self) -> None:
        """Raise StoppedError where nobody waits any more; tell of a wait that has become long."""
        if self._ended.is_set():
            raise StoppedError(f"{self.who} is not waited for any more", do="resume the run")
        stopped = self._stop()
        if stopped is not None:
            raise stopped
        if self._began is None or self._told or threading.get_ident() != self._owner:
            return
        waited = time.monotonic() - self._began
        if waited >= max(self.after, 2 * self._usual):
            self._told = True
            self._say(over=False, seconds=waited)

    def sleep(self, seconds: float) -> None:
        """A pause."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.look()
            self._ended.wait(min(left, _LOOK))
        self.look()

    def until(self, done: Callable[[float], bool]) -> None:
        """Wait until something is `done`, which is asked with how long it may wait for that itself."""
        with self():
            while not done(_LOOK):
                self.look()

    def _say(self, *, over: bool, seconds: float) -> None:
        if self._tell is not None:
            values = {"who": self.who, "over": over, "waited_seconds": seconds, "reason": "" if over else self._reason}
            self._tell(Event("waiting", values))


def _nobody() -> LuthierError | None:
    """Nobody has asked to stop."""
    return None
