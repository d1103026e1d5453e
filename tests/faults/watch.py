"""Watching one trial in this process: processor time, peak memory, and an alarm for what never ends."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import final

_STATUS = Path("/proc/self/status")
_PEAK = Path("/proc/self/clear_refs")
_WALL_SECONDS = 30


class HangError(BaseException):
    """A trial that did not end. No `except Exception` may swallow it."""


@final
class Watch:
    """What a block took: processor seconds, those outside the kernel, and by how many bytes memory rose meanwhile."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.user_seconds = 0.0
        self.bytes = 0

    @contextlib.contextmanager
    def over(self) -> Iterator[None]:
        """Measure the block. Processor time: on a busy machine wall-clock time says nothing of a hang."""
        start = _begin()
        began, user = time.process_time(), os.times().user
        try:
            yield
        finally:
            self.seconds = time.process_time() - began
            self.user_seconds = os.times().user - user
            self.bytes = _field("VmHWM") - start


@contextlib.contextmanager
def alarmed(seconds: int = _WALL_SECONDS) -> Iterator[None]:
    """Raise HangError in the block when it has not ended after `seconds`; only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(_number: int, _frame: FrameType | None) -> None:
        raise HangError(f"not over after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _begin() -> int:
    # The kernel forgets the peak when 5 is written; where it does not let us, peaks of earlier trials count too.
    with contextlib.suppress(OSError):
        _PEAK.write_bytes(b"5")
    return _field("VmRSS")


def _field(name: str) -> int:
    data = _STATUS.read_bytes()
    start = data.index(name.encode() + b":")
    return int(data[start:].split(None, 2)[1]) * 1024
