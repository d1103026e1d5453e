"""Our end of the process that chat templates run in: started when first needed, bounded in time, replaced when it dies.

Idea: the limits of processor time and memory are kept by the kernel inside that process (`worker.py`). Here is
only a generous limit of wall time, for a process that hangs, so that a busy machine raises no false alarm. Whoever owns
this object owns the process: it ends with the object, with `close`, and with us.

Use through `Template`. One object serves several threads, one at a time.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, final

from luthier.core.child import start_child
from luthier.core.errors import MissingError, TemplateError

WORKER: Final = "luthier.data.rendering.worker"
WALL_SECONDS: Final = 60.0
"""Seconds without an answer after which the process counts as hanging."""
MAX_REQUEST: Final = 16 * 1024 * 1024
"""Characters of one conversation as JSON: four times what a rendering may become."""
MOST_LOST: Final = 40
"""Limits reached one after another, with no text between, after which a template is not asked any more."""
_AT_ONCE: Final = 1024 * 1024
"""Characters of several conversations in one request. The process has to hold them in little memory."""
_LENGTH: Final = 4
_MAX_ANSWER: Final = 4 * 4 * 1024 * 1024 + 1
"""Bytes of one answer: the characters that a rendering may have, in UTF-8, behind a letter."""
_REPLACED: Final = (0, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGHUP, -signal.SIGXCPU)
"""Ends that say nothing about the template: somebody, or old age, ended the process. It is asked once more."""


@dataclass(frozen=True, slots=True)
class Program:
    """A template as the process needs it: its source under a key, the day it knows, and the special tokens.

    `now` is a Unix time, the zone's distance from UTC in seconds, and its name.
    """

    key: str
    name: str
    source: str
    now: tuple[float, float, str]
    tokens: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Seen:
    """What a template looks at."""

    calls: bool
    results: bool
    tools: bool


@final
class RenderProcess:
    """The process, or none yet: `compile` and `render` start it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        self._end: weakref.finalize[[], RenderProcess] | None = None
        self._lost: dict[str, int] = {}

    @property
    def pid(self) -> int | None:
        """The number of the process; None when there is none."""
        return self._worker.child.pid if self._worker is not None else None

    def compile(self, program: Program) -> Seen:
        """Compile a template and say what it looks at. Raises TemplateError with jinja2's words, or the limit."""
        with self._lock:
            try:
                return self._compile(program)
            except _GoneError as gone:
                if gone.status not in _REPLACED:
                    raise _ended(program, gone.status) from None
            try:
                return self._compile(program)
            except _GoneError as gone:
                raise _ended(program, gone.status) from None

    def render(self, program: Program, jobs: Sequence[str]) -> list[str | TemplateError]:
        """One text, or the reason why there is none, for each of `jobs` (contexts as JSON objects), in order."""
        made: list[str | TemplateError] = []
        tried = -1  # the job that was under way when somebody else ended the process
        with self._lock:
            while len(made) < len(jobs):
                if self._lost.get(program.key, 0) >= MOST_LOST:
                    made.append(_over(program, f"it reached a limit {MOST_LOST} times in a row; it is not asked again"))
                    continue
                before = len(made)
                try:
                    self._render(program, _fitting(jobs[before:]), made)
                except _GoneError as gone:
                    if gone.status in _REPLACED and tried != len(made):
                        tried = len(made)
                    else:
                        self._limited(program, made, before, _ended(program, gone.status))
        return made

    def outline(self, program: Program, jobs: Sequence[str]) -> list[str | None]:
        """What the template writes around contents that are left open, as JSON; None where that cannot be told."""
        made: list[str | None] = []
        with self._lock:
            try:
                if sum(map(len, jobs)) <= _AT_ONCE:
                    self._outline(program, jobs, made)
            except (_GoneError, TemplateError):
                # Whoever asks for the texts themselves hears of it.
                self.close()
        return [*made, *[None] * (len(jobs) - len(made))]

    def _outline(self, program: Program, jobs: Sequence[str], made: list[str | None]) -> None:
        worker = self._asked("outline", program, jobs)
        for _ in jobs:
            kind, words = worker.answer()
            made.append(words if kind == "o" else None)
            if kind == "l":
                self.close()
                return

    def _asked(self, do: str, program: Program, jobs: Sequence[str]) -> _Worker:
        """The process, which knows the template and has the answers to these jobs to give."""
        # The jobs are JSON already: they go into the list as they are.
        request = _request(do, program, tokens=program.tokens)[:-1] + f',"jobs":[{",".join(jobs)}]}}'
        worker = self._ready()
        worker.ask(request, 1 + len(jobs))
        if worker.answer()[0] == "u":
            # The process is a new one, or it serves many templates.
            worker.owed = 0
            self._compile(program)
            worker.ask(request, 1 + len(jobs))
            worker.answer()
        return worker

    def _limited(self, program: Program, made: list[str | TemplateError], before: int, error: TemplateError) -> None:
        """Append the error for a limit, and count how many there were with nothing between them."""
        self._lost[program.key] = 1 + (self._lost.get(program.key, 0) if len(made) == before else 0)
        made.append(error)

    def close(self) -> None:
        """End the process; it is started again when it is needed."""
        if self._end is not None:
            self._end()
        self._worker = self._end = None

    def _ready(self) -> _Worker:
        if self._worker is None or not self._worker.usable:
            self.close()
            self._worker = _Worker()
            self._end = weakref.finalize(self, self._worker.stop)
        return self._worker

    def _compile(self, program: Program) -> Seen:
        worker = self._ready()
        worker.ask(_request("compile", program, source=program.source, now=program.now), 1)
        kind, words = worker.answer()
        if kind == "c":
            seen = json.loads(words)
            return Seen(calls=bool(seen["calls"]), results=bool(seen["results"]), tools=bool(seen["tools"]))
        if kind == "w":
            raise TemplateError(f"the chat template does not compile: {words}", where=program.name)
        self.close()
        raise _over(program, words)

    def _render(self, program: Program, jobs: Sequence[str], made: list[str | TemplateError]) -> None:
        """Append the outcomes of `jobs` to `made`, up to one that reaches a limit."""
        before = len(made)
        if len(jobs[0]) > MAX_REQUEST:
            made.append(_long(program, len(jobs[0])))
            return
        worker = self._asked("render", program, jobs)
        for _ in jobs:
            kind, words = worker.answer()
            if kind == "t":
                made.append(words)
            elif kind == "w":
                made.append(TemplateError(f"the chat template says: {words}", where=program.name))
            else:
                self.close()
                self._limited(program, made, before, _over(program, words))
                return
        self._lost.pop(program.key, None)


class _GoneError(Exception):
    """The process ended before it answered; `status` is its exit status, None when it hung or wrote nonsense."""

    def __init__(self, status: int | None) -> None:
        super().__init__(status)
        self.status = status


@final
class _Worker:
    """One running process and the pipes to it."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        try:
            self.child = start_child(WORKER, [str(self._owner)], stderr=subprocess.DEVNULL, bare=True)
        except OSError as failure:
            raise MissingError(f"the process that renders chat templates cannot be started: {failure}") from failure
        if self.child.stdin is None or self.child.stdout is None:
            raise MissingError(f"the process {self.child.pid}, which renders chat templates, has no pipes")
        self._stdin, self._stdout = self.child.stdin, self.child.stdout
        os.set_blocking(self._stdin.fileno(), False)
        os.set_blocking(self._stdout.fileno(), False)
        self._writable, self._readable = select.poll(), select.poll()
        self._writable.register(self._stdin, select.POLLOUT)
        self._readable.register(self._stdout, select.POLLIN)
        self._buffer = bytearray()
        self.owed = 0
        """Answers not read yet: after an interruption the two ends no longer agree on what is being said."""

    @property
    def usable(self) -> bool:
        """Whether a request can be sent: not after a fork, an interruption, or the end of the process."""
        return self._owner == os.getpid() and not self.owed and self.child.poll() is None

    def stop(self) -> None:
        """Close the pipes, end the process and wait for it, unless it is our parent's."""
        self._stdin.close()
        self._stdout.close()
        if self._owner == os.getpid():
            self.child.kill()
            self.child.wait()
        else:
            self.child.returncode = 0  # so that Python does not complain about a process that is not ours

    def ask(self, request: str, answers: int) -> None:
        """Send a request that has this many answers."""
        self.owed = answers
        body = request.encode("utf-8", "surrogatepass")
        view = memoryview(len(body).to_bytes(_LENGTH, "big") + body)
        try:
            while view:
                if not self._writable.poll(WALL_SECONDS * 1000):
                    raise self._gone(hung=True)
                view = view[os.write(self._stdin.fileno(), view) :]
        except BrokenPipeError:
            raise self._gone(hung=False) from None

    def answer(self) -> tuple[str, str]:
        """The letter and the text of the next answer."""
        size = int.from_bytes(self._take(_LENGTH), "big")
        if not 0 < size <= _MAX_ANSWER:
            raise self._gone(hung=True)
        body = self._take(size)
        self.owed -= 1
        try:
            return chr(body[0]), body[1:].decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise self._gone(hung=True) from None

    def _take(self, count: int) -> bytes:
        until = time.monotonic() + WALL_SECONDS
        while len(self._buffer) < count:
            if not self._readable.poll(max(until - time.monotonic(), 0) * 1000):
                raise self._gone(hung=True)
            piece = os.read(self._stdout.fileno(), 1 << 20)
            if not piece:
                raise self._gone(hung=False)
            self._buffer += piece
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken

    def _gone(self, *, hung: bool) -> _GoneError:
        """End the process and say how it ended by itself, if it did."""
        if not hung:
            try:
                return _GoneError(self.child.wait(timeout=5))
            except subprocess.TimeoutExpired:
                hung = True
        self.child.kill()
        self.child.wait()
        return _GoneError(None)


def _request(do: str, program: Program, **more: object) -> str:
    return json.dumps({"do": do, "key": program.key, **more}, ensure_ascii=False)


def _fitting(jobs: Sequence[str]) -> Sequence[str]:
    """As many of `jobs`, at least one, as one request may hold."""
    size = 0
    for count, job in enumerate(jobs):
        size += len(job)
        if count and size > _AT_ONCE:
            return jobs[:count]
    return jobs


def _long(program: Program, size: int) -> TemplateError:
    return TemplateError(
        f"the conversation has {size:,} characters of JSON",
        allowed=f"at most {MAX_REQUEST:,} (template_limit)",
        do="cut it into several rows, or take the row out",
        where=program.name,
    )


def _over(program: Program, words: str) -> TemplateError:
    return TemplateError(
        f"the chat template was stopped: {words} (template_limit)",
        do="choose another template with data.template",
        where=program.name,
    )


def _ended(program: Program, status: int | None) -> TemplateError:
    """The error for a template whose process ended, with this exit status, before there was a text."""
    if status == -signal.SIGPROF:
        return _over(program, "it takes too long: more than half a second of processor time")
    if status is None:
        return _over(program, f"its process did not answer within {WALL_SECONDS:g} seconds")
    how = f"by signal {-status}" if status < 0 else f"with exit status {status}"
    return TemplateError(
        f"the process that renders the chat template ended {how}",
        do="choose another template with data.template; if all of them fail, see what `python -m "
        f"{WORKER} {os.getpid()}` says",
        where=program.name,
    )
