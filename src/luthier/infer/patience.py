"""Patience with an engine that is not there now: the same is asked again, after pauses that grow.

Idea: an engine that is started anew, or that has too many requests, answers a little later. What is wrong with a
request or with an answer stays wrong, so only an `UnavailableError` is waited for; one that says how long it wants to
be left alone (Retry-After) is left alone so long. Long waits are told (core/waiting.py).
Use when: what is asked may be asked twice: answers with a seed are, and so is loading what is loaded already.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeVar, final

from luthier.core.errors import RecipeError
from luthier.core.waiting import Waits
from luthier.infer.wire import UnavailableError

_LONGEST: Final = 30.0
"""Seconds of a pause."""
T = TypeVar("T")


@final
@dataclass(frozen=True)
class Patience:
    """Asks again for so many `seconds` after the first failure, the first time after `pause` seconds; 0 never."""

    seconds: float = 0.0
    pause: float = 0.5
    waits: Waits = field(default_factory=lambda: Waits("the engine"), repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.seconds < 0 or self.pause <= 0:
            raise RecipeError(f"asking again for {self.seconds} seconds, after {self.pause}",
                              allowed="0 seconds or more, after a pause above 0")  # fmt: skip

    def get(self, ask: Callable[[], T]) -> T:
        """What `ask` gives. Raises its last UnavailableError when the time is over, and any other error at once."""
        with self.waits():
            pause, latest = self.pause, None
            while True:
                self.waits.look()
                try:
                    found = ask()
                    if latest is not None:
                        self.waits.failed("")
                    return found
                except UnavailableError as failure:
                    # Whoever has cut the call off does not want another one.
                    self.waits.look()
                    self.waits.failed(failure.received)
                    latest = time.monotonic() + self.seconds if latest is None else latest
                    wanted = max(pause, failure.pause)
                    if time.monotonic() + wanted > latest:
                        raise self._gone(failure) from failure
                self.waits.sleep(wanted)
                pause = min(2 * pause, _LONGEST)

    def _gone(self, failure: UnavailableError) -> UnavailableError:
        waited = f", and again and again for {self.seconds:g} seconds" if self.seconds else ""
        if self.seconds and failure.pause > self.seconds:
            waited = f", and not to be asked for {failure.pause:g} seconds, more than the {self.seconds:g} there are"
        return UnavailableError(failure.received + waited, allowed=failure.allowed, do=failure.do)
