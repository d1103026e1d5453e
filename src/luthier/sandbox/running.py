"""A program run to its end: what it returned, printed and used."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, Final

from luthier.sandbox.guest.candidate import PLACE
from luthier.sandbox.guest.values import BorderError, packable, unpack_parsed
from luthier.sandbox.guest_process import GuestProcess, OverError
from luthier.sandbox.program import Call, Limits, Outcome, Program, Returned, Status
from luthier.sandbox.zygotes import Zygote

MOST_SOURCE: Final = 4 * 1024 * 1024
"""Bytes of a program, its input and its files."""
_SHOWN: Final = 600


def run_program(zygote: Zygote, program: Program, limits: Limits, *, writable: bool) -> Outcome:
    """Run a program in a fresh process. Raises LostError or OSError where the sandbox fails."""
    try:
        questions = [question(call) for call in program.calls]
        check(program, writable=writable)
    except BorderError as failure:
        return Outcome(Status.REFUSED, reason=str(failure))
    returned: list[Returned] = []
    with GuestProcess(zygote, limits, program.stdin) as process:
        begun = Begun(process, program, script=not program.calls)
        try:
            begun.until_ready()
            for asked in questions:
                returned.append(answered(process, asked))
            process.say({"do": "end"})
            over = process.finish()
        except OverError as failure:
            over = failure
        return begun.outcome(over, tuple(returned), asked=len(questions))


class Begun:
    """A program on its way, and how far it came."""

    def __init__(self, process: GuestProcess, program: Program, *, script: bool) -> None:
        self.process = process
        self._compiled = False
        self._ready = False
        self._said: Mapping[str, Any] = {}
        process.say({"source": program.source, "files": dict(program.files), "script": script})

    def until_ready(self) -> None:
        """Until its source has run. Raises OverError where it does not come so far."""
        self._said = self.process.hear()
        if self._said.get("is") == "compiled":
            self._compiled = True
            self._said = self.process.hear()
        if self._said.get("is") not in ("ready", "raised", "uncompiled"):
            raise self.process.stop(Status.KILLED, "it spoke before it was asked")
        if self._said.get("is") != "ready":
            self.process.say({"do": "end"})  # to whoever is left there and listens
            raise self.process.finish()
        self._ready = True

    def outcome(self, over: OverError, returned: tuple[Returned, ...], *, asked: int) -> Outcome:
        """All that is known of it after its end."""
        status, reason = over.status, over.reason
        raised = ""
        if status is Status.EXITED and self._said.get("is") in ("raised", "uncompiled"):
            status, reason, raised = Status.RAISED, line(self._said.get("error")), line(self._said.get("raised"))
        elif status is Status.EXITED and self._ready and len(returned) == asked and over.reason.endswith(" 0"):
            status, reason = Status.ENDED, ""
        last = returned[-1].raised if returned else raised
        if "MemoryError" in (raised, last) and status in (Status.RAISED, Status.ENDED):
            status, reason = Status.OUT_OF_MEMORY, reason or "a call found no memory left"
        return Outcome(
            status,
            compiled=self._compiled,
            returned=returned,
            stdout=self.process.text("out"),
            stderr=self.process.text("error"),
            seconds=self.process.seconds,
            cpu_seconds=self.process.cpu_seconds,
            reason=reason,
            raised=raised,
        )


def answered(process: GuestProcess, asked: Mapping[str, Any]) -> Returned:
    """Ask for one call and take the answer; the time between is measured here."""
    began = time.monotonic()
    answer = process.ask(asked)
    return returned_from(answer, time.monotonic() - began)


def returned_from(answer: Mapping[str, Any], seconds: float) -> Returned:
    """An answer, read strictly."""
    if "error" in answer:
        crosses = answer.get("crosses", True) is True
        return Returned(None, line(answer["error"]), line(answer.get("raised")), crosses, seconds)
    try:
        return Returned(unpack_parsed(answer.get("value")), seconds=seconds)
    except BorderError as failure:
        return Returned(None, str(failure), "TypeError", False, seconds)


def question(call: Call) -> dict[str, Any]:
    """A call as it goes through the channel. Raises BorderError where it does not."""
    if PLACE.fullmatch(call.function) is None:
        raise BorderError(f"{call.function[:80]!r} names no function; name, name.attribute or Class().method does")
    return {
        "do": "call",
        "function": call.function,
        "arguments": [packable(argument) for argument in call.arguments],
        "keywords": {name: packable(value) for name, value in call.keywords.items()},
        "watch": False,
    }


def check(program: Program, *, writable: bool) -> None:
    """Raises BorderError for a program that cannot be handed over."""
    if program.files and not writable:
        raise BorderError("this tier has no folder to put files in; with user namespaces it would")
    texts = [program.source, program.stdin, *program.files, *program.files.values()]
    try:
        size = sum(len(text.encode("utf-8")) for text in texts)
    except UnicodeEncodeError:
        raise BorderError("a text with half a surrogate pair does not cross") from None
    if size > MOST_SOURCE:
        raise BorderError(f"{size:,} bytes of program, input and files; at most {MOST_SOURCE:,}")
    for name in program.files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name or not path.name:
            raise BorderError(f"{name[:80]!r} is no name of a file in the working folder")


def line(text: object) -> str:
    """What a guest said, short and in one line."""
    shown = " ".join(str(text or "").split())[:_SHOWN]
    return shown.encode("utf-8", "replace").decode("utf-8")
