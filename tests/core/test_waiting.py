"""Waiting: a long wait is told once and told to be over, by the run's own thread, and ends when the run is to stop."""

from __future__ import annotations

import threading
import time

import pytest

from luthier.core.errors import LuthierError, StoppedError
from luthier.core.events import Event
from luthier.core.waiting import Waits


def listening(after: float = 0.05) -> tuple[Waits, list[Event], list[LuthierError]]:
    """Somebody who waits, what was told of it, and where to put what shall end it."""
    waits, told, ends = Waits("it", after=after), [], []  # type: ignore[var-annotated]
    waits.bind(told.append, lambda: ends[0] if ends else None)
    return waits, told, ends


def test_a_wait_is_told_once_and_what_is_usual_is_no_news() -> None:
    """Breaks when each rollout of a slow engine is two lines, or a wait that is short is told."""
    waits, told, _ = listening()
    waits.until(lambda seconds: True)
    assert not told
    waits.failed("it is drained")
    with waits():
        for _ in range(3):
            waits.sleep(0.1)
    assert [event.values["over"] for event in told] == [False, True]
    assert told[0].values["reason"] == "it is drained" and told[1].values["reason"] == ""
    with waits():
        waits.sleep(0.3)
    assert len(told) == 2, "the one before took as long"
    with waits(), waits():
        waits.sleep(1.0)
    assert len(told) == 4


def test_nobody_but_the_runs_own_thread_tells() -> None:
    """Breaks when two threads write into one log."""
    waits, told, _ = listening(0.0)

    def beside() -> None:
        with waits():
            waits.sleep(0.1)

    thread = threading.Thread(target=beside)
    thread.start()
    thread.join()
    assert not told


def test_nobody_waits_for_a_run_that_is_to_stop() -> None:
    """Breaks when Ctrl-C has to wait, or a wait that failed is told to be over."""
    waits, told, ends = listening()
    threading.Timer(0.1, ends.append, [StoppedError("stopped by SIGINT", do="resume")]).start()
    began = time.monotonic()
    with pytest.raises(StoppedError, match="SIGINT"):
        waits.sleep(60)
    assert time.monotonic() - began < 30 and not any(event.values["over"] for event in told)
    waits, _, _ = listening()
    threading.Timer(0.1, waits.end).start()
    with pytest.raises(StoppedError, match="it is not waited for any more"):
        waits.until(threading.Event().wait)
