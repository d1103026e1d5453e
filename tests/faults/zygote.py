"""A fork server: processes that have luthier (and torch) imported already, so that a thousand start in minutes.

`Zygote` starts `python -m tests.faults.zygote` once; each `start` forks it and calls one function there, in a session
of its own, with its output in a file. Forking a process that has imported torch is safe as long as it has one thread,
which is checked before each fork. Nothing but imports happens before the fork, so a forked process computes what a
fresh one does. The caller watches a child through a pidfd and may signal it at any moment; it is reaped only when
asked, so its number cannot be another's meanwhile.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, final

MARK = "FAULT_TRIAL"
"""Environment variable that every program started below a child carries."""

HEAVY = (
    "torch", "luthier.cli.main", "luthier.recipes.finetune",
    "luthier.recipes.proving.verify", "luthier.recipes.proving.proof",
    "luthier.train.result", "tests.faults.zygote", "tests.faults.broken",
    # What a run imports only when it comes to need it: a third of its processor time, were it not here already.
    "numpy.ctypeslib", "numpy.ma", "rich._emoji_codes", "tokenizers.trainers", "torch.profiler._cupti_monitor",
    "transformers.convert_slow_tokenizer", "transformers.generation.utils", "transformers.models.llama.modeling_llama",
    "transformers.processing_utils", "transformers.tokenization_utils_tokenizers", "transformers.video_utils",
)  # fmt: skip
LIGHT = ("tests.faults.zygote", "tests.faults.saver")
_REPOSITORY = Path(__file__).resolve().parents[2]
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def luthier(*arguments: str) -> int:
    """A command line of luthier, in this process, from the entry point on; its exit code."""
    from luthier.cli.main import main

    sys.argv = ["luthier", *arguments]
    try:
        main()
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else 1
    return 0


@final
class Child:
    """A process of the zygote, from its fork until `reap`."""

    def __init__(self, zygote: Zygote, pid: int, marker: str) -> None:
        self.zygote = zygote
        self.pid = pid
        self.marker = marker
        self.began = time.monotonic()
        self._watch = os.pidfd_open(pid)

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, after at most `seconds`."""
        poll = select.poll()
        poll.register(self._watch, select.POLLIN)
        return bool(poll.poll(max(0.0, seconds) * 1000))

    def signal(self, number: int) -> None:
        """Send it a signal; one that has ended takes no notice."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._watch, number)

    def reap(self, seconds: float) -> int | None:
        """Its exit code, or minus the signal that ended it; None if it takes longer than `seconds`: it is killed."""
        ended = self.wait(seconds)
        if not ended:
            self.signal(signal.SIGKILL)
            self.wait(30)
        os.close(self._watch)
        code = int(self.zygote.ask({"reap": self.pid})["code"])
        return code if ended else None


@final
class Zygote:
    """The fork server, as its user sees it. `heavy` ones have torch and the commands, light ones the store alone."""

    def __init__(self, *, heavy: bool = True) -> None:
        paths = [str(_REPOSITORY), str(_REPOSITORY / "src"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        first = os.environ.get("PYTHONPATH", "").split(os.pathsep) if os.environ.get("PYTHONPATH") else []
        environ = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": os.pathsep.join([*first, *paths]),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote", "heavy" if heavy else "light"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ, start_new_session=True, text=True,
        )  # fmt: skip
        self._talk = threading.Lock()
        self._number = 0
        self._answer()

    def start(
        self, call: str, *arguments: object, out: Path, gate: Path | None = None, prepare: Sequence[str] = ()
    ) -> Child:
        """Fork, and call `module:function` with `arguments` (as texts); what it returns is the exit code.

        Its output goes to `out`. It first calls what `prepare` names, then waits until nobody holds the lock `gate`.
        """
        self._number += 1
        # Empty, even if it is killed before it has said a word.
        out.write_bytes(b"")
        marker = f"{os.getpid()}-{self._process.pid}-{self._number}"
        order = {
            "call": call, "arguments": [str(argument) for argument in arguments], "out": str(out),
            "gate": str(gate or ""), "prepare": list(prepare), "marker": marker,
        }  # fmt: skip
        return Child(self, int(self.ask(order)["pid"]), marker)

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """Send an order; the answer."""
        with self._talk:
            if self._process.stdin is None:
                raise RuntimeError("the fork server has no input")
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise RuntimeError(f"the fork server ended with {self._process.wait()}")
        found = json.loads(line)
        if "error" in found:
            raise RuntimeError(f"the fork server says: {found['error']}")
        return dict(found)

    def close(self) -> None:
        """End it, and what is left of its children."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._process.wait()


@cache
def zygote(*, heavy: bool = True) -> Zygote:
    """The one fork server of its kind in this process, which ends with it: imports take longer than a trial."""
    made = Zygote(heavy=heavy)
    atexit.register(made.close)
    return made


def survivors(child: Child, *, within: float = 5.0) -> list[str]:
    """The command lines of processes that `child`, which has ended, has left behind, after at most `within` seconds."""
    until = time.monotonic() + within
    while (left := family(child)) and time.monotonic() < until:
        time.sleep(0.01)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return [f"{pid}: {command}" for pid, command in left.items()]


def family(child: Child) -> dict[int, str]:
    """The living processes of a child's session besides itself, and those that carry its mark, with their commands."""
    mark = f"{MARK}={child.marker}".encode()
    found = {}
    for place in Path("/proc").iterdir():
        if not place.name.isdigit() or int(place.name) == child.pid:
            continue
        try:
            fields = (place / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
            marked = mark in (place / "environ").read_bytes().split(b"\0")
            command = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            # It ended while we looked.
            continue
        state, session = fields[0], int(fields[3])
        if state not in "ZX" and (marked or session == child.pid):
            found[int(place.name)] = command
    return found


# ------------------------------------------------------------------------------------------------- the server itself


def serve(names: Sequence[str]) -> None:
    """Import, say so, and fork for each order until there are no more."""
    for name in names:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    if names is HEAVY:
        _warm()
    gc.collect()
    gc.freeze()
    children: set[int] = set()
    _say({"ready": os.getpid()})
    for line in sys.stdin:
        order = json.loads(line)
        if "reap" in order:
            _, status = os.waitpid(order["reap"], 0)
            children.discard(order["reap"])
            _say({"code": os.waitstatus_to_exitcode(status)})
            continue
        threads = len(list(Path("/proc/self/task").iterdir()))
        if threads != 1:
            _say({"error": f"{threads} threads; a fork would not be safe"})
            continue
        pid = os.fork()
        if pid == 0:
            _become(order)
        children.add(pid)
        _say({"pid": pid})
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def _warm() -> None:
    """Load every method, and let transformers compile the names that it knows of old weights: it does so once."""
    from luthier.core import catalog

    for family in catalog.families():
        for name in catalog.names(family):
            catalog.load(family, name)
    mapping = importlib.import_module("transformers.conversion_mapping")
    mapping.get_checkpoint_conversion_mapping("llama")


def _say(values: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def _become(order: dict[str, Any]) -> None:
    """In the child: do what is ordered, and leave as an interpreter does that has reached its end."""
    code = 1
    try:
        os.setsid()
        for number in _SIGNALS:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.environ[MARK] = order["marker"]
        nothing = os.open(os.devnull, os.O_RDONLY)
        out = os.open(order["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
        os.dup2(nothing, 0)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.close(nothing)
        os.close(out)
        # The reader's buffer holds orders for the server; the child reads nothing.
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        for call in order["prepare"]:
            _named(call)()
        if order["gate"]:
            with Path(order["gate"]).open("rb") as gate:
                fcntl.flock(gate, fcntl.LOCK_SH)
        code = int(_named(order["call"])(*order["arguments"]))
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else 1
    except BaseException as error:  # noqa: BLE001
        # As an interpreter tells what nobody has caught.
        sys.excepthook(type(error), error, error.__traceback__)
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
    # What the interpreter does at its end, short of tearing down modules: end pools, wait for threads, write the rest.
    threading._shutdown()  # type: ignore[attr-defined]
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _named(call: str) -> Any:
    module, _, function = call.partition(":")
    return getattr(importlib.import_module(module), function)


if __name__ == "__main__":
    serve(HEAVY if sys.argv[1:] == ["heavy"] else LIGHT)
