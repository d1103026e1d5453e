"""Signals: SIGINT, SIGTERM and SIGHUP ask a run to save and stop, SIGUSR1 asks it to save; a second one stops at once.

While there is a loop, a request waits for the end of the step at hand. Before the first step and after the last one
nothing needs to be saved, and a request ends the run where it is.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import final

from luthier.core.errors import LuthierError, StoppedError

STOPS = ("SIGINT", "SIGTERM", "SIGHUP")
SAVES = "SIGUSR1"


@final
class StopRequest:
    """Whether somebody has asked the run to stop, and how; whether somebody has asked it to save."""

    def __init__(self) -> None:
        self.reason = ""
        self.wants_save = False
        self.raised = False
        """Whether `require_patience` has raised: a library may have made an error of its own of it."""
        self._patient = False
        self._again = "run the same command again"

    def ask(self, reason: str) -> None:
        """Ask it to stop."""
        self.reason = self.reason or reason

    def require_patience(self) -> None:
        """Raise StoppedError when nobody would look at the request: see `patient`."""
        if self.reason and not self._patient:
            self.raised = True
            raise self.error()

    def error(self) -> StoppedError:
        """The error for a request. Made anew: one that is kept keeps the frames it went through from ending."""
        return StoppedError(f"stopped by {self.reason}; no step was lost", do=self._again)

    def resumes_with(self, command: str) -> None:
        """What goes on with the run, once there is one."""
        self._again = command

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Within the block a request is only noted, because somebody looks at it after each step.

        Raises StoppedError for one that was made before and dropped.
        """
        self.require_patience()
        self._patient = True
        try:
            yield
        finally:
            self._patient = False

    def take_save(self) -> bool:
        """Whether a save was asked for since the last call."""
        asked, self.wants_save = self.wants_save, False
        return asked

    def __bool__(self) -> bool:
        return bool(self.reason)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """A request that signals fill within the block; the old handlers come back after it.

    The second signal goes to the handler that was there before, which for SIGINT is KeyboardInterrupt. A signal that
    was ignored before (SIGHUP under nohup) stays ignored. Outside the main thread, where Python takes no handlers, the
    request can only be filled by hand.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    names = [name for name in (*STOPS, SAVES) if name in signal.Signals.__members__]
    before = {signal.Signals[name]: signal.getsignal(signal.Signals[name]) for name in names}
    unraisable = sys.unraisablehook

    def dropped(told: sys.UnraisableHookArgs) -> None:
        # Python drops what is raised while an object is finalised, and prints it; the request is there all the same.
        if not isinstance(told.exc_value, StoppedError):
            unraisable(told)

    def handle(number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == SAVES:
            request.wants_save = True
            return
        signal.signal(number, before[signal.Signals(number)] or signal.SIG_DFL)
        request.ask(name)
        request.require_patience()

    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, handle)
    sys.unraisablehook = dropped
    try:
        yield request
    except LuthierError:
        raise
    except Exception as error:
        if not request.raised:
            raise
        raise request.error() from error
    finally:
        sys.unraisablehook = unraisable
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
