"""Stops beside a run: they end a command with their own code, whatever they broke into."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import Any

import pytest

from luthier.cli import main
from luthier.core.errors import StoppedError
from tests.cli.commands import environ

FORGOTTEN_THREAD = """
import concurrent.futures, luthier.cli.main as main
def run(arguments, *, debug=False):
    pool = concurrent.futures.ThreadPoolExecutor(1)
    pool.submit(int).result()
    # What a signal leaves of a pool when it comes between the start of its thread and the note that there is one.
    concurrent.futures.thread._threads_queues.clear()
    held = [pool]
    held.append(held)
    return {code}
main.run = run
main.main()
"""


@pytest.mark.parametrize(
    ("reason", "code", "said"),
    [(KeyboardInterrupt(), 130, ""), (StoppedError("stopped by SIGTERM"), 75, "error[stopped]: stopped by SIGTERM")],
)
def test_a_signal_beside_a_command_is_no_surprise(
    reason: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks when Ctrl-C before the command has begun, or while an error is told, asks for a bug report."""

    def interrupted(arguments: list[str], *, debug: bool = False) -> int:
        raise reason

    monkeypatch.setattr(main, "run", interrupted)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(SystemExit) as left:
        main.main()
    assert left.value.code == code
    printed = capsys.readouterr().err
    assert printed.startswith(said) and bool(printed) == bool(said)


def test_a_stop_that_a_library_has_wrapped_is_still_a_stop(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks when SIGTERM within a call back from a library ends in that library's error and asks for a bug report."""
    handlers: dict[int, Any] = {}

    def wrapping(arguments: list[str], *, debug: bool = False) -> int:
        try:
            handlers[signal.SIGTERM](signal.SIGTERM, None)
        except Exception as stopped:
            raise ValueError(f"error in a callback: {stopped}") from stopped
        return 0

    monkeypatch.setattr(main, "run", wrapping)
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "argv", ["luthier", "describe"])
    with pytest.raises(SystemExit) as left:
        main.main()
    assert left.value.code == 75
    assert capsys.readouterr().err.startswith("error[stopped]: stopped by SIGTERM; nothing was begun")


def test_a_thread_that_a_stop_has_cut_loose_holds_nothing_up() -> None:
    """Breaks when a stopped command waits forever for a library's thread. The same thread does hold up other ends."""

    def ended(code: int, *, within: float) -> int:
        command = [sys.executable, "-c", FORGOTTEN_THREAD.format(code=code)]
        return subprocess.run(command, check=False, env=environ(), timeout=within).returncode

    assert ended(StoppedError.exit_code, within=60) == 75
    with pytest.raises(subprocess.TimeoutExpired):
        ended(0, within=4)
