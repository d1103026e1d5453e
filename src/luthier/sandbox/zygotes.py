"""Our end of a zygote: start it, let it fork a candidate, kill, see how it ended."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Final, final

MODULES: Final = ("kernel", "filters", "values", "frames", "candidate", "stand_ins", "examiner", "zygote", "launch")
"""Modules of guest/ in the order in which they need each other."""
START_SECONDS: Final = 120.0
"""For a machine that is very busy, and modules that take long to import."""
_MOST_BOOK: Final = 1 << 24
_BOOT: Final = """
import json, os, sys, types
book = json.loads(os.pread(int(sys.argv[1]), int(sys.argv[2]), 0))
for name in ("luthier", "luthier.sandbox", "luthier.sandbox.guest"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = []
for name, text in book["sources"]:
    module = sys.modules["luthier.sandbox.guest." + name] = types.ModuleType("luthier.sandbox.guest." + name)
    setattr(sys.modules["luthier.sandbox.guest"], name, module)
    exec(compile(text, "guest/" + name + ".py", "exec"), module.__dict__)
sys.modules["luthier.sandbox.guest.launch"].main(book["settings"])
"""


class LostError(Exception):
    """The sandbox failed, not the program: the zygote ended, a pipe broke, the host has no descriptors left."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process of a candidate ended: exit code, or minus the signal; its processor time; for want of memory?"""

    status: int
    cpu_seconds: float
    out_of_memory: bool = False


@final
class Zygote:
    """One zygote. Start it from a thread that lives as long as it shall: bubblewrap is bound to that thread."""

    def __init__(self, interpreter: str, settings: Mapping[str, Any]) -> None:
        self._owner = os.getpid()
        command = [interpreter, "-s", "-P", "-S", "-c", _BOOT]
        with ExitStack() as kept, ExitStack() as given:
            self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            kept.callback(self.control.close)
            given.callback(theirs.close)
            self._words = os.memfd_create("words", os.MFD_CLOEXEC)
            kept.callback(os.close, self._words)
            book = os.memfd_create("book", 0)
            given.callback(os.close, book)
            command += [str(book), str(_MOST_BOOK)]
            os.write(book, _book({**settings, "again": command}))
            self._process = subprocess.Popen(
                command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=self._words, pass_fds=(book,),
                env=dict(settings["environment"]), cwd="/", start_new_session=True,
            )  # fmt: skip
            given.close()  # or the end of the other side would not be seen
            kept.callback(self._reap)
            self._expect(b"W", START_SECONDS)
            self._open = kept.pop_all()

    @property
    def pid(self) -> int:
        """The process that we started; the zygote is it or one of its children."""
        return self._process.pid

    def run(self, descriptors: list[int]) -> None:
        """Fork a candidate that has these as channel, output, error output and perhaps input."""
        try:
            socket.send_fds(self.control, [b"R"], descriptors)
        except OSError as failure:
            raise LostError(f"the zygote does not take the program: {failure}") from None
        self._expect(b"S", START_SECONDS)

    def kill(self) -> None:
        """Kill the candidate that runs, with all it started."""
        try:
            self.control.send(b"K")
        except OSError as failure:
            raise LostError(f"the zygote is gone: {failure}") from None

    def ended(self) -> Ended:
        """What the zygote says at the end of a candidate; to be asked once `control` can be read."""
        said = self._said()
        if said[:1] != b"E":
            raise LostError(f"the zygote ended; {self._last_words() or 'it left no words'}")
        how = json.loads(said[1:])
        return Ended(how["status"], how["cpu"], how["over"])

    def wait(self, seconds: float) -> Ended:
        """As `ended`, once it is said."""
        if not _readable(self.control, seconds):
            raise LostError(f"a process of a candidate did not end within {seconds:g} s of being killed")
        return self.ended()

    def close(self) -> None:
        """End it and all it started, and wait for that."""
        self._open.close()

    def _reap(self) -> None:
        self.control.close()
        if os.getpid() != self._owner:
            self._process.returncode = 0  # a fork of ours; what our parent started goes on
            return
        try:
            self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _expect(self, letter: bytes, seconds: float) -> None:
        if not _readable(self.control, seconds):
            raise LostError(f"the zygote did not answer within {seconds:g} s")
        if self._said() != letter:
            raise LostError(self._last_words() or "the zygote ended and left no words")

    def _said(self) -> bytes:
        try:
            return self.control.recv(4096)
        except OSError as failure:
            raise LostError(f"the zygote is gone: {failure}") from None

    def _last_words(self) -> str:
        return os.pread(self._words, 2000, 0).decode("utf-8", "replace").strip()[-600:]


def _readable(control: socket.socket, seconds: float) -> bool:
    waiting = select.poll()
    waiting.register(control, select.POLLIN)
    return bool(waiting.poll(seconds * 1000))


def _book(settings: Mapping[str, Any]) -> bytes:
    folder = files("luthier.sandbox.guest")
    sources = [(name, folder.joinpath(f"{name}.py").read_text("utf-8")) for name in MODULES]
    return json.dumps({"sources": sources, "settings": settings}).encode()
