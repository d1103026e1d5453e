"""Child processes of our own: Python modules that work apart from us and never outlive us.

Idea: what must not share our memory (untrusted templates) or must not profit from it (the proof of a saved result) runs
as `python -m MODULE` in a process of its own, which ends when we end, whatever way that is. On Linux the kernel sees to
it (`PR_SET_PDEATHSIG`), and everywhere the end of its standard input does, which only we hold open.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import IO, Final

_PR_SET_PDEATHSIG: Final = 1
_NEEDED: Final = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ")
"""What an interpreter may need to start; names of secrets (tokens, keys, proxies) are not among them."""
WAIT_POLICY: Final = "OMP_WAIT_POLICY"
"""How threads of OpenMP wait for work: passive is asleep. It is read once, when torch is loaded."""


def start_child(
    module: str,
    arguments: Sequence[str] = (),
    *,
    stderr: int = subprocess.PIPE,
    bare: bool = False,
    without: Sequence[str] = (),
) -> subprocess.Popen[bytes]:
    """`python -m module arguments` with pipes on standard input and output; `module` calls `bound_to_parent` first.

    Start it from the main thread, or from one that lives as long as the child shall: on Linux the child is bound to the
    thread that started it. The child sees our import path, our `-O` and, unless it is `bare`, our environment, but
    for the variables it is to do `without`.
    """
    optimised = ["-" + "O" * sys.flags.optimize] if sys.flags.optimize else []
    # -P: `-m` would put the working directory first on the import path, and that may be a folder from the internet.
    command = [sys.executable, "-P", *optimised, "-m", module, *arguments]
    known = {name: os.environ[name] for name in _NEEDED if name in os.environ} if bare else os.environ
    given = {name: value for name, value in known.items() if name not in without}
    environment = {**given, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, env=environment, close_fds=True
    )


def answer_of(child: subprocess.Popen[bytes]) -> tuple[bytes, int]:
    """All that a child writes to its standard output, and its exit code.

    Whatever interrupts us meanwhile (Ctrl-C, a request to stop) ends the child too.
    """
    try:
        answer = b"" if child.stdout is None else child.stdout.read()
        return answer, child.wait()
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()


def bound_to_parent(*, watch: IO[bytes] | None = None, thread: bool = True) -> None:
    """In the child: end when the parent ends, and leave Ctrl-C to the parent.

    `watch` is a stream that nothing is ever sent through; its end is the parent's. A child that reads its standard
    input sees the end by itself and passes none. A child that shall outlive the `thread` that started it passes False
    and looks now and then whether `os.getppid()` has changed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if thread and sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if watch is not None:
        threading.Thread(target=_leave_with, args=(watch,), daemon=True).start()


def _leave_with(stream: IO[bytes]) -> None:
    while stream.read(1):
        pass
    os._exit(1)
