"""Every command explains itself with two examples that really are command lines."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from luthier.cli import main
from luthier.cli.main import app
from luthier.core.errors import StoppedError
from tests.cli.commands import environ, luthier

LEAVES = [
    ("demo",), ("init",), ("train",), ("resume",), ("generate",), ("eval",), ("describe",), ("doctor",),
    ("data", "show"), ("data", "check"), ("data", "stats"), ("run", "list"), ("run", "show"),
]  # fmt: skip


def commands() -> Iterator[tuple[str, ...]]:
    for name, command in typer.main.get_command(app).commands.items():
        inner = getattr(command, "commands", None)
        yield from [(name, deeper) for deeper in inner] if inner else [(name,)]


def test_the_commands_are_those_of_the_manual() -> None:
    assert sorted(commands()) == sorted(LEAVES)


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_help_has_two_examples_that_parse(path: tuple[str, ...]) -> None:
    told = luthier(*path, "--help").must(0)
    assert told.err == "" and "\x1b" not in told.out
    examples = re.findall(r"^\s*luthier (.+)$", told.out.partition("Examples:")[2], re.MULTILINE)
    assert len(examples) == 2
    for example in examples:
        parses(shlex.split(example), path)


def parses(words: list[str], path: tuple[str, ...]) -> None:
    """Let typer read the words without running the command; wrong ones raise."""
    command = typer.main.get_command(app)
    for name in path:
        assert words[0] == name
        command, words = command.commands[name], words[1:]
    command.make_context(path[-1], words)


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_what_prints_has_json_and_what_writes_has_a_dry_run(path: tuple[str, ...]) -> None:
    told = luthier(*path, "--help").out
    assert "--json" in told
    assert ("--dry-run" in told) == (path[0] in ("demo", "init", "train", "resume"))


def test_an_unknown_command_or_option_is_a_usage_error_with_the_nearest_name() -> None:
    luthier("trian").must(2, "No such command 'trian'", "train")
    luthier("train", "recipe.yaml", "--bogus").must(2, "No such option: --bogus")
    luthier("train").must(2, "Missing argument")
    luthier().must(2)


def test_an_error_nobody_foresaw_is_one_sentence_and_a_traceback_only_on_request() -> None:
    code = "import sys, luthier.cli.main as m\ndef run(*a, **k): raise ZeroDivisionError('x')\nm.run = run\nm.main()"
    for more, traced in (([], False), (["--debug"], True)):
        told = subprocess.run(
            [sys.executable, "-c", code, "doctor", *more], capture_output=True, text=True, check=False, env=environ()
        )
        assert told.returncode == 1
        assert ("Traceback" in told.stderr) == traced
        assert "ZeroDivisionError: x" in told.stderr and ("--debug" in told.stderr) != traced


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
