"""Requests to stop: raised where nobody would look at them, and never lost in an error of somebody else."""

from __future__ import annotations

import signal
import threading

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
