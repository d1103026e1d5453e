"""Requests to stop: raised where nobody would look at them, and never lost in an error of somebody else."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable

import pytest

from luthier.core.errors import RecipeError, StoppedError
from luthier.train.signals import stop_on_signals

main_thread = pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="signals need the main thread"
)


@main_thread
def test_a_stop_that_a_library_has_wrapped_is_still_a_stop() -> None:
    """Breaks when SIGTERM within a call back from a library ends a run in that library's error."""

    def library() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except StoppedError as stopped:
            raise ValueError(f"error in a callback: {stopped}") from stopped

    with pytest.raises(StoppedError, match="stopped by SIGTERM; no step was lost") as told, stop_on_signals():
        library()
    assert isinstance(told.value.__cause__, ValueError)


@main_thread
@pytest.mark.parametrize("error", [ValueError("its own"), RecipeError("its own")])
def test_an_error_without_a_stop_stays_what_it_is(error: Exception) -> None:
    """Breaks when every error of a run is taken for a stop."""
    with pytest.raises(type(error), match="its own"), stop_on_signals():
        raise error


@main_thread
def test_a_patient_run_is_not_interrupted() -> None:
    """Breaks when a request ends the step at hand."""
    with stop_on_signals() as request, request.patient():
        signal.raise_signal(signal.SIGHUP)
        assert request and request.reason == "SIGHUP"


@main_thread
def test_a_request_that_python_drops_stops_at_the_next_place_without_a_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Breaks when a signal that comes while an object is finalised is printed as a fault, or forgotten."""

    class Finalised:
        def __init__(self, what: Callable[[], object]) -> None:
            self.what = what

        def __del__(self) -> None:
            self.what()

    def run() -> None:
        with stop_on_signals() as request:
            Finalised(lambda: signal.raise_signal(signal.SIGTERM))
            assert request.reason == "SIGTERM" and not told
            Finalised(lambda: 1 / 0)
            assert len(told) == 1, "what others drop is told as ever"
            with request.patient():
                raise AssertionError("it went on")

    hook = sys.unraisablehook
    told: list[object] = []
    sys.unraisablehook = told.append
    try:
        with pytest.raises(StoppedError, match="SIGTERM"):
            run()
    finally:
        sys.unraisablehook = hook
    assert capsys.readouterr().err == ""
