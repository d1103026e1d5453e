"""Every command explains itself with two examples that really are command lines."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator

import pytest
import typer

from luthier.cli.main import app
from tests.cli.commands import environ, luthier

LEAVES = [
    ("demo",), ("init",), ("train",), ("resume",), ("generate",), ("classify",), ("eval",),
    ("compare",), ("describe",), ("doctor",), ("quantize",), ("plan",), ("lint",), ("serve",), ("merge",), ("probe",),
    ("export",), ("reward",),
    ("data", "show"), ("data", "check"), ("data", "stats"), ("data", "kernels"), ("run", "list"), ("run", "show"),
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
    writing = ("demo", "init", "train", "resume", "merge", "export", "probe", "kernels")
    assert ("--dry-run" in told) == (path[-1] in writing)


def test_an_unknown_command_or_option_is_a_usage_error_with_the_nearest_name() -> None:
    luthier("trian").must(2, "No such command 'trian'", "train")
    luthier("train", "recipe.yaml", "--bogus").must(2, "No such option: --bogus")
    for more in ((), ("recipe.yaml",)):
        luthier("train", *more, "--data", "rows.jsonl").must(2, "luthier init recipe.yaml --data", "--set data.train=")
    assert "init" not in luthier("train", "recipe.yaml", "--bogus").err
    assert "init" not in luthier("export", "runs/a", "--data", "rows.jsonl").err
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
