"""Stopping on request: SIGINT and SIGTERM ask the loop to save and stop; a second one stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import final


@final
class StopRequest:
    """Whether somebody has asked the run to stop, and how."""

    def __init__(self) -> None:
        self.reason = ""

    def ask(self, reason: str) -> None:
        self.reason = self.reason or reason

    def __bool__(self) -> bool:
        return bool(self.reason)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """A request that SIGINT and SIGTERM fill within the block; the old handlers come back after it.

    The second signal goes to the handler that was there before, which for SIGINT is KeyboardInterrupt. Outside the main
    thread, where Python takes no handlers, the request can only be filled by hand.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, _frame: FrameType | None) -> None:
        request.ask(signal.Signals(number).name)
        signal.signal(number, before[signal.Signals(number)] or signal.SIG_DFL)

    for number in before:
        signal.signal(number, handle)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
