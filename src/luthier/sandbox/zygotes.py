"""Our end of a zygote: start it, let it fork a candidate, kill, see how it ended.

Idea: the process that we start may end before what it has forked is bound to it (bubblewrap, killed between its clone
and the moment where its child has asked to go with it). Such a child holds the other end of the control socket, so
that no end of it is seen: it may wait for a parent that is gone, for ever, or go on to serve. So the process itself is
watched, by a pidfd that no other process can come to stand for; without it nothing that is said counts. What is left
of its session is killed while its number is still taken, by it, so that the number can be nobody else's.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Final, final

MODULES: Final = ("kernel", "filters", "values", "frames", "candidate", "stand_ins", "examiner", "zygote", "launch")
"""Modules of guest/ in the order in which they need each other."""
START_SECONDS: Final = 120.0
"""For a machine that is very busy, and modules that take long to import."""
_LEAVE_SECONDS: Final = 2.0
"""For a zygote that was told to go."""
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
            self.life = os.pidfd_open(self._process.pid)
            kept.callback(os.close, self.life)
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
        if not self._told(seconds):
            raise LostError(f"a process of a candidate did not end within {seconds:g} s of being killed")
        return self.ended()

    def gone(self) -> bool:
        """Whether the process that we started has ended."""
        return _readable([self.life], 0)

    def close(self) -> None:
        """End it and all it started, and wait for that."""
        self._open.close()

    def _reap(self) -> None:
        if os.getpid() != self._owner:
            self._process.returncode = 0  # a fork of ours; what our parent started goes on
            return
        # Closing alone is not seen by the other side as long as a thread of ours waits here.
        with suppress(OSError):
            self.control.shutdown(socket.SHUT_RDWR)
        if not _readable([self.life], _LEAVE_SECONDS):
            signal.pidfd_send_signal(self.life, signal.SIGKILL)
            _readable([self.life], START_SECONDS)
        # Before it is waited for, its number is its own, and that of its session: nobody else is hit.
        with suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _expect(self, letter: bytes, seconds: float) -> None:
        if not self._told(seconds):
            raise LostError(f"the zygote did not answer within {seconds:g} s")
        if self._said() != letter or self.gone():
            raise LostError(self._last_words() or "the zygote ended and left no words")

    def _told(self, seconds: float) -> bool:
        """Whether something was said within this time. Raises LostError where the process has ended without a word."""
        if _readable([self.control.fileno(), self.life], seconds) and not _readable([self.control.fileno()], 0):
            raise LostError(self._last_words() or "the zygote ended and left no words")
        return _readable([self.control.fileno()], 0)

    def _said(self) -> bytes:
        try:
            return self.control.recv(4096)
        except OSError as failure:
            raise LostError(f"the zygote is gone: {failure}") from None

    def _last_words(self) -> str:
        return os.pread(self._words, 2000, 0).decode("utf-8", "replace").strip()[-600:]


def _readable(descriptors: list[int], seconds: float) -> bool:
    """Whether one of them has something to be read, or is at its end, within this time."""
    waiting = select.poll()
    for descriptor in descriptors:
        waiting.register(descriptor, select.POLLIN)
    return bool(waiting.poll(seconds * 1000))


def _book(settings: Mapping[str, Any]) -> bytes:
    folder = files("luthier.sandbox.guest")
    sources = [(name, folder.joinpath(f"{name}.py").read_text("utf-8")) for name in MODULES]
    return json.dumps({"sources": sources, "settings": settings}).encode()
