"""What is asked of the sandbox and what it answers: programs and calls in, outcomes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """How a program ended. None of them is a verdict about its answers."""

    ENDED = "ended"  # ran to its end, and every call was answered, with a value or with an error
    RAISED = "raised"  # the program itself, not one of its functions, ended with an exception
    EXITED = "exited"  # left by itself before all was answered
    TIMED_OUT = "timed-out"
    OUT_OF_MEMORY = "out-of-memory"
    KILLED = "killed"  # ended by a signal, or because it wrote more than it may
    REFUSED = "refused"  # not run: what was asked does not fit through the border
    BROKEN = "broken"  # the sandbox failed, twice; this says nothing about the program and must never be scored


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use."""

    seconds: float = 10.0
    """Wall time from the moment it is locked up, all its calls together."""
    cpu_seconds: float = 10.0
    memory_bytes: int = 512 * 1024 * 1024
    """Memory of each of its processes, and soon after that of all together, beyond what the interpreter needs."""
    output_bytes: int = 1024 * 1024
    """Bytes of standard output, of standard error, and of each answer."""
    processes: int = 16
    """Processes and threads at a time, where the tier allows new processes at all."""
    file_bytes: int = 64 * 1024 * 1024
    """Bytes of all files it may have at a time; they lie in memory."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call: of `name`, of a method `Class().name` of a fresh object, or of `name.attribute`."""

    function: str
    arguments: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Program:
    """Python source, and what to do with it once it has run.

    Without calls it is run as a script (`__name__ == "__main__"`). `files` are put into its working folder first.
    """

    source: str
    calls: tuple[Call, ...] = ()
    stdin: str = ""
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Returned:
    """The answer to one call: a value built here from plain data, or an error; both are what the program claims."""

    value: Any = None
    error: str | None = None
    """`ValueError: ...` as the program told it; None when there is a value."""
    raised: str = ""
    """The builtin exception that the error is one of."""
    crosses: bool = True
    """False where there was a value that is no plain data."""
    seconds: float = 0.0
    """Between question and answer, by our clock."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a program."""

    status: Status
    compiled: bool = False
    """Whether it is Python at all; found out before any of it ran."""
    returned: tuple[Returned, ...] = ()
    """Answers in the order of the calls; fewer when it ended before."""
    stdout: str = ""
    stderr: str = ""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """By the kernel's account: of its first process, and of those that this one waited for."""
    reason: str = ""
    raised: str = ""
    """The builtin exception that ended it, as it claims; empty when none did."""


@dataclass(frozen=True, slots=True)
class Case:
    """One test of several: its text, whether it held, and why not."""

    test: str
    passed: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Examination:
    """What tests said about a program that never shared a process with them."""

    status: Status
    """ENDED when the tests ran to their end, whatever they found; BROKEN when the sandbox failed."""
    cases: tuple[Case, ...] = ()
    candidate: Outcome = field(default_factory=lambda: Outcome(Status.REFUSED))
    reason: str = ""
    not_plain: int = 0
    """Calls whose arguments or results are no plain data, so that the tests could not see them."""

    @property
    def passed(self) -> int:
        """How many tests held."""
        return sum(case.passed for case in self.cases)

    @property
    def total(self) -> int:
        """How many tests there are; those that were not reached count."""
        return len(self.cases)

    @property
    def all_passed(self) -> bool:
        """Whether there was a test, and all held."""
        return self.status is Status.ENDED and 0 < self.total == self.passed
