"""Running commands in this process or in another one, and the small files that they run on."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

from luthier.cli.main import run
from luthier.train.stepper import Stepper, StepReport
from tests.faults.zygote import Child, zygote
from tests.faults.zygote import luthier as as_command

COLOURS = ("red", "blue", "green", "white", "black", "brown", "pink", "grey")
STEPS = 8
SLOW = """
import sys, time
from luthier.train.stepper import Stepper
plain = Stepper.optim_step
def slowly(self, *, factor=1.0):
    time.sleep({pause})
    return plain(self, factor=factor)
Stepper.optim_step = slowly
from luthier.cli.main import main
main()
"""


@dataclass(frozen=True)
class Said:
    """What a command gave back and printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one line of JSON on stdout."""
        lines = self.out.splitlines()
        assert len(lines) == 1, f"{len(lines)} lines on stdout: {self.out[:300]!r}; stderr: {self.err[:300]!r}"
        found = json.loads(lines[0])
        assert isinstance(found, dict)
        return found

    def must(self, code: int, *parts: str) -> Said:
        """This, once the exit code and the parts of the sentence on stderr have been checked."""
        assert self.code == code, f"exit code {self.code}, not {code}: {self.err}{self.out[:500]}"
        for part in parts:
            assert part in self.err, f"{part!r} is not in {self.err!r}"
        return self


def luthier(*arguments: object) -> Said:
    """Run a command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([str(argument) for argument in arguments])
    return Said(code, out.getvalue(), err.getvalue())


def environ() -> dict[str, str]:
    """The environment of another process that shall compute as this one does."""
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": os.pathsep.join(sys.path)}


@contextlib.contextmanager
def process(*arguments: object, pause: float = 0.05) -> Iterator[subprocess.Popen[str]]:
    """The same in a process of its own, in which each step takes a moment longer; killed when the block ends."""
    command = [sys.executable, "-c", SLOW.format(pause=pause), *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ()) as child:
        try:
            yield child
        finally:
            child.kill()


@final
class Forked:
    """What is used here of `subprocess.Popen`, for a process that was forked. All that it prints is one text."""

    def __init__(self, child: Child, out: Path) -> None:
        self.pid = child.pid
        self.returncode: int | None = None
        self._child = child
        self._out = out
        self._reaped = False

    def poll(self) -> int | None:
        """None while it lives."""
        if not self._reaped and self._child.wait(0):
            self.communicate()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Any signal."""
        self._child.signal(number)

    def kill(self) -> None:
        """End it, if it has not come to an end."""
        if not self._reaped:
            self._child.signal(signal.SIGKILL)

    def communicate(self, timeout: float = 60) -> str:
        """Wait for its end, at most `timeout` seconds; what it has printed."""
        if not self._reaped:
            self._reaped, self.returncode = True, self._child.reap(timeout)
        return self._out.read_text("utf-8", "replace")


@contextlib.contextmanager
def forked(*arguments: object, out: Path, pause: float = 0.05) -> Iterator[Forked]:
    """`process`, without the seconds of its imports: of a fork server that has imported luthier and nothing more."""
    threads = torch.get_num_threads()
    child = Forked(zygote().start("tests.cli.commands:slowly", pause, threads, *arguments, out=out), out)
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def slowly(pause: str, threads: str, *arguments: str) -> int:
    """A command line of luthier, with a pause before each step; its exit code."""
    plain = Stepper.optim_step

    def paused(self: Stepper, *, factor: float = 1.0) -> StepReport:
        time.sleep(float(pause))
        return plain(self, factor=factor)

    Stepper.optim_step = paused  # type: ignore[method-assign]
    os.environ["OMP_NUM_THREADS"] = threads
    torch.set_num_threads(int(threads))
    return as_command(*arguments)


def wait_for_step(folder: Path, step: int, child: subprocess.Popen[str] | Forked) -> None:
    """Return once the run in `folder` has done `step` steps."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if any(event["step"] >= step for event in step_events(folder)):
            return
        if child.poll() is not None:
            raise AssertionError(f"the process ended early: {child.communicate()}")
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached in a minute")


def step_events(folder: Path) -> list[dict[str, Any]]:
    """What each step logged, without times."""
    return [
        {key: value for key, value in event.items() if key not in ("time", "seconds", "source_seconds")}
        for event in events(folder)
        if event["kind"] == "step"
    ]


def events(folder: Path) -> list[dict[str, Any]]:
    """The log of a run, as far as its lines are whole."""
    path = folder / "events.jsonl"
    text = path.read_text("utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, with its bytes; links and folders with empty ones."""
    if not folder.exists():
        return {}
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        for path in sorted(folder.rglob("*"))
    }


def chat(question: str, answer: str, *, role: str = "assistant") -> dict[str, Any]:
    """A row of one question and its answer."""
    return {"messages": [{"role": "user", "content": question}, {"role": role, "content": answer}]}


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def colour_rows(path: Path, count: int = 40) -> Path:
    """A small file with a pattern that can be learned."""
    return write_rows(path, [chat(f"the colour of {n} is", COLOURS[n % 8]) for n in range(count)])


def recipe_text(model: Path, rows: Path, *, adapter: str = "{method: lora, rank: 4, alpha: 8.0, dropout: 0.1}") -> str:
    """A recipe that runs in a fraction of a second."""
    return (
        f"model: {model}\n"
        f"data:\n  train: {rows}\n"
        f"adapter: {adapter}\n"
        "optimizer: {method: adamw, learning_rate: 0.01}\n"
        "batch: {rows: 8}\n"
        f"budget: {{steps: {STEPS}}}\n"
        "evaluation: {fraction: 0.2, every: 4, prompts: 1, max_new_tokens: 4}\n"
        "checkpoint: {every: 2}\n"
        "precision: float32\n"
    )
