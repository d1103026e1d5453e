"""Our own children, forked in tests from a process that has imported luthier already: imports are most of their time.

What stands here for `start_child` runs the same module's `main` with the same arguments, environment, working directory
and pipes; a run in it is proved there. What it does not show is that the module can be started: one test of each module
does, by `start_child`.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, final

from tests.faults.broken import proof_in_this_process
from tests.faults.zygote import MARK, Child, zygote

LONGEST = 500.0
"""Seconds after which a child hangs; tests have shorter limits of their own."""


@final
class Said:
    """The standard output of a child: all of it, once the child has ended."""

    def __init__(self, child: ForkedChild) -> None:
        self._child = child
        self.text = b""

    def read(self) -> bytes:
        self._child.wait()
        return self.text

    def close(self) -> None:
        """Nothing is open."""


@final
class ForkedChild:
    """What is used of `subprocess.Popen` by those who start our children."""

    def __init__(self, child: Child, folder: tempfile.TemporaryDirectory[str], stdin: BinaryIO) -> None:
        self.pid = child.pid
        self.returncode: int | None = None
        self.stdin = stdin
        self.stdout = Said(self)
        self._child = child
        self._folder = folder

    def poll(self) -> int | None:
        """None while it lives."""
        if self.returncode is None and self._child.wait(0):
            self.returncode = self._child.reap(0)
            self.stdout.text = (Path(self._folder.name) / "out").read_bytes()
            self._folder.cleanup()
        return self.returncode

    def wait(self, timeout: float = LONGEST) -> int:
        """Its exit code, or minus the signal that ended it."""
        if not self._child_ended(timeout):
            raise subprocess.TimeoutExpired("a forked child", timeout)
        code = self.poll()
        assert code is not None
        return code

    def _child_ended(self, seconds: float) -> bool:
        return self.returncode is not None or self._child.wait(seconds)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            self._child.signal(number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def forked_child(
    module: str, arguments: Sequence[str] = (), *, stderr: int, bare: bool = False, without: Sequence[str] = ()
) -> Any:
    """`start_child`, by a fork."""
    folder = tempfile.TemporaryDirectory(prefix="luthier-child-")
    pipe = Path(folder.name) / "in"
    os.mkfifo(pipe)
    # Open for both, so that neither of us waits for the other; the child sees the end when we close it.
    stdin = os.fdopen(os.open(pipe, os.O_RDWR | os.O_CLOEXEC), "wb", buffering=0)
    assert not bare
    about = {
        "module": module, "arguments": list(arguments), "in": str(pipe), "folder": str(Path.cwd()), "path": sys.path,
        "error": f"/proc/{os.getpid()}/fd/{stderr}",
        "environment": {name: value for name, value in os.environ.items() if name not in without},
    }  # fmt: skip
    child = zygote().start("tests.children:become", json.dumps(about), out=Path(folder.name) / "out")
    return ForkedChild(child, folder, stdin)


def become(text: str) -> int:
    """In the child: what an interpreter does for `python -m module`."""
    about = json.loads(text)
    error = os.open(about["error"], os.O_WRONLY | os.O_APPEND)
    stdin = os.open(about["in"], os.O_RDONLY)
    os.dup2(stdin, 0)
    os.dup2(error, 2)
    os.close(stdin)
    os.close(error)
    mark = os.environ[MARK]
    os.environ.clear()
    os.environ.update(about["environment"], **{MARK: mark})
    os.chdir(about["folder"])
    sys.path[:] = about["path"]
    # As in the tests themselves (conftest.py).
    proof_in_this_process()
    module = importlib.import_module(about["module"])
    sys.argv = [str(module.__file__), *about["arguments"]]
    code = module.main()
    return int(code or 0)
