"""One process of a guest, as the host sees it: questions in, answers out, and limits that the host keeps.

Idea: all that comes from there is bytes. They are counted before they are kept, read strictly, and nothing in them is
believed beyond "this is what it says". The clock, the account of processor time and the end of the process come from
the kernel and from the zygote, which no candidate can reach.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import socket
import time
from collections.abc import Mapping
from typing import Any, Final, final

from luthier.sandbox.guest.values import BorderError, parsed
from luthier.sandbox.program import Limits, Status
from luthier.sandbox.zygotes import Ended, LostError, Zygote

LOCK_SECONDS: Final = 60.0
"""For a new process to be locked up, on a machine that is very busy."""
END_SECONDS: Final = 10.0
"""For a killed process to be gone."""
_NEARLY: Final = 0.9
_HEAD: Final = 4
_PIECE: Final = 1 << 16


class OverError(Exception):
    """The process is not there any more, or it is no longer heard: how that came about."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


@final
class GuestProcess:
    """A process that a zygote forked. A context manager: at its end the process, and all it started, is gone."""

    def __init__(self, zygote: Zygote, limits: Limits, stdin: str = "") -> None:
        self._zygote = zygote
        self._limits = limits
        self._ended: Ended | None = None
        self._over: OverError | None = None
        self._inbox = bytearray()
        self._outbox = memoryview(b"")
        self.texts = {"out": bytearray(), "error": bytearray()}
        self._sources: dict[int, str] = {}
        self._open_channel = True
        self._poll = select.poll()
        self._control = zygote.control.fileno()  # kept, for it may be closed while we wait
        self._until = time.monotonic() + LOCK_SECONDS
        self._began = time.monotonic()
        self._channel = self._open(stdin)

    def __enter__(self) -> GuestProcess:
        try:
            said = self.hear()
        except BaseException as failure:
            self._close()
            if isinstance(failure, OverError):
                raise LostError(f"a new process was not locked up: {failure.reason}") from None
            raise
        if said.get("is") != "locked":
            self._close()
            raise LostError(f"a new process was not locked up: {said.get('why')}")
        # From here on it runs what it was given, so from here on its time counts.
        self._began = time.monotonic()
        self._until = self._began + self._limits.seconds
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    @property
    def seconds(self) -> float:
        """Since it was locked up."""
        return time.monotonic() - self._began

    @property
    def cpu_seconds(self) -> float:
        """Its processor time; known when it has ended."""
        return self._ended.cpu_seconds if self._ended else 0.0

    def text(self, of: str) -> str:
        """What it wrote to `out` or to `error`."""
        return self.texts[of][: self._limits.output_bytes].decode("utf-8", "replace")

    def say(self, message: Mapping[str, Any]) -> None:
        """Send a message; it goes out while we listen."""
        body = json.dumps(message, separators=(",", ":")).encode()
        self._outbox = memoryview(bytes(self._outbox) + len(body).to_bytes(_HEAD, "big") + body)

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Send a question and wait for the answer, which nobody can have written before. Raises as `hear` does."""
        if self._over is None and self._ended is None:
            self._read_channel()
        if self._inbox:
            raise self._over or self.stop(Status.KILLED, "it answered before it was asked")
        self.say(question)
        return self.hear()

    def hear(self) -> dict[str, Any]:
        """The next message. Raises OverError where there will be none, LostError where the sandbox failed."""
        while True:
            message = self._message()
            if message is not None:
                return message
            if self._over is not None:
                raise self._over
            self._turn()

    def finish(self) -> OverError:
        """Wait for its end, and say how that was."""
        while self._over is None:
            self._inbox.clear()  # nobody asks any more
            self._turn()
        return self._over

    def stop(self, status: Status, reason: str) -> OverError:
        """Kill it and all it started."""
        if self._ended is None:
            self._zygote.kill()
            self._ended = self._zygote.wait(END_SECONDS)
        self._over = OverError(status, reason)
        return self._over

    # ------------------------------------------------------------------------------------------------------ inside
    def _open(self, stdin: str) -> socket.socket:
        ours, theirs = socket.socketpair()
        given: list[int] = []
        try:
            for name in ("out", "error"):
                reading, writing = os.pipe2(os.O_CLOEXEC)
                self._sources[reading] = name
                given.append(writing)
                os.set_blocking(reading, False)
            if stdin:
                given.append(_readable_text(stdin))
            self._zygote.run([theirs.fileno(), *given])
        except BaseException:
            ours.close()
            for descriptor in self._sources:
                os.close(descriptor)
            raise
        finally:
            theirs.close()
            for descriptor in given:
                os.close(descriptor)
        ours.setblocking(False)
        for source in (self._control, self._zygote.life, ours.fileno(), *self._sources):
            self._poll.register(source, select.POLLIN)
        return ours

    def _turn(self) -> None:
        """Wait until something happens, and take it in."""
        channel = self._channel.fileno()
        left = self._until - time.monotonic()
        if left <= 0:
            self.stop(Status.TIMED_OUT, f"more than {self._limits.seconds:g} s")
            return
        if self._open_channel:
            self._poll.modify(channel, select.POLLIN | (select.POLLOUT if self._outbox else 0))
        ready = self._poll.poll(left * 1000 + 1)
        for descriptor, events in ready:
            if descriptor == channel:
                if events & select.POLLOUT:
                    self._write()
                if events & ~select.POLLOUT:
                    self._read_channel()
            elif descriptor in self._sources:
                self._read_text(descriptor)
        if not any(descriptor == self._control for descriptor, _ in ready) and self._zygote.gone():
            raise LostError("the zygote ended, and what it had started went on without it")
        if any(descriptor == self._control for descriptor, _ in ready):
            self._ended = self._zygote.ended()
            # Nobody can write any more, so what is left is all there is.
            self._read_channel()
            for descriptor in list(self._sources):
                self._read_text(descriptor)
            self._over = self._over or self._how(self._ended)

    def _read_channel(self) -> None:
        while self._open_channel and self._over is None:
            try:
                piece = self._channel.recv(_PIECE)
            except BlockingIOError:
                return
            except ConnectionResetError:
                piece = b""
            if not piece:
                self._open_channel = False
                self._poll.unregister(self._channel)
                return
            self._inbox += piece
            if len(self._inbox) > self._limits.output_bytes + _HEAD + _PIECE:
                self.stop(Status.KILLED, f"an answer of more than {self._limits.output_bytes:,} bytes")

    def _read_text(self, descriptor: int) -> None:
        text = self.texts[self._sources[descriptor]]
        while self._over is None:
            try:
                piece = os.read(descriptor, _PIECE)
            except BlockingIOError:
                return
            if not piece:
                self._poll.unregister(descriptor)
                os.close(descriptor)
                self._sources.pop(descriptor)
                return
            text += piece
            if len(text) > self._limits.output_bytes:
                self.stop(Status.KILLED, f"more than {self._limits.output_bytes:,} bytes of output")

    def _write(self) -> None:
        try:
            self._outbox = self._outbox[self._channel.send(self._outbox[:_PIECE]) :]
        except BlockingIOError:
            return
        except (BrokenPipeError, ConnectionResetError):
            self._outbox = memoryview(b"")  # it closed its end; its end will tell

    def _message(self) -> dict[str, Any] | None:
        if len(self._inbox) < _HEAD:
            return None
        size = int.from_bytes(self._inbox[:_HEAD], "big")
        if size > self._limits.output_bytes:
            raise self._over or self.stop(Status.KILLED, f"an answer of more than {self._limits.output_bytes:,} bytes")
        if len(self._inbox) < _HEAD + size:
            return None
        body = bytes(self._inbox[_HEAD : _HEAD + size])
        del self._inbox[: _HEAD + size]
        try:
            message = parsed(body)
        except BorderError as failure:
            raise self.stop(Status.KILLED, f"wrote nonsense into the channel: {failure}") from None
        if not isinstance(message, dict):
            raise self.stop(Status.KILLED, "wrote nonsense into the channel")
        return message

    def _how(self, ended: Ended) -> OverError:
        if ended.out_of_memory:
            return OverError(Status.OUT_OF_MEMORY, "its processes together hold more memory than they may")
        # The kernel kills at its own ticks, which may come a little before the account is full.
        killed = -ended.status in (signal.SIGKILL, signal.SIGXCPU)
        if ended.cpu_seconds > self._limits.cpu_seconds * (_NEARLY if killed else 1):
            return OverError(Status.TIMED_OUT, f"more than {self._limits.cpu_seconds:g} s of processor time")
        if -ended.status == signal.SIGKILL:
            # It cannot do that to itself: the first process of a namespace is spared, and where there is none the
            # filter refuses the signal.
            raise LostError("somebody else killed the process: a hand, or the kernel for want of memory")
        if ended.status < 0:
            return OverError(Status.KILLED, f"ended by signal {-ended.status}")
        return OverError(Status.EXITED, f"left by itself with exit code {ended.status}")

    def _close(self) -> None:
        try:
            if self._ended is None:
                self._zygote.kill()
                self._ended = self._zygote.wait(END_SECONDS)
        finally:
            self._channel.close()
            for descriptor in self._sources:
                os.close(descriptor)
            self._sources.clear()


def _readable_text(text: str) -> int:
    """A file in memory that holds `text` and that nobody can change."""
    descriptor = os.memfd_create("stdin", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(text.encode("utf-8", "surrogatepass"))
    os.lseek(descriptor, 0, os.SEEK_SET)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | 0x1)
    return descriptor
