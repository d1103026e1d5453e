"""What every fault campaign gives back, and how its trials are counted.

A campaign breaks the same thing many times, at random or at every place, and says of each trial how it ended: a
verdict. Each campaign module has `run(count, *, seed, folder) -> Campaign` and `control(*, seed, folder) -> Campaign`,
the negative control: a deliberately broken variant, in which the campaign must find failures. `scripts/faults.py` runs
them all and prints the table; the quick tests beside this file run each with a small count.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import final

CLEAN = "clean"
"""The verdict of a trial in which the promise was kept."""

SHOWN_FAILURES = 12
_EVERY_SECONDS = 5.0


class UnavailableError(Exception):
    """This machine lacks what the campaign needs (a privilege, a program). Tests skip visibly, the table says so."""


@dataclass(frozen=True)
class Campaign:
    """What came of a campaign: `passed` trials kept the promise; `control` says in words what the broken variant is."""

    fault: str
    promise: str
    tried: int
    passed: int
    verdicts: dict[str, int]
    seconds: float
    seed: int
    control: str
    failures: tuple[str, ...] = ()
    """The first few failures, each with what is needed to see it again."""
    notes: tuple[str, ...] = ()
    """Figures that belong to the row, in sentences: a longest time, a share."""

    @property
    def is_clean(self) -> bool:
        """Whether trials were made and each kept the promise."""
        return 0 < self.tried == self.passed

    def must_hold(self) -> Campaign:
        """This, if every trial kept the promise; else AssertionError with the first failures and the seed."""
        told = "\n".join(self.failures)
        assert self.is_clean, f"{self.fault}: {self.passed} of {self.tried} (seed {self.seed}) {self.verdicts}\n{told}"
        return self

    def must_fail(self) -> Campaign:
        """This, if failures were found, as a negative control has to."""
        assert self.passed < self.tried, f"{self.fault}: the broken variant passed {self.passed} of {self.tried} trials"
        return self


@final
class Tally:
    """Counts the verdicts of one campaign and tells how far it is on stderr."""

    def __init__(
        self, fault: str, promise: str, *, seed: int, control: str, passes: tuple[str, ...] = (CLEAN,)
    ) -> None:
        self.fault = fault
        self.promise = promise
        self.seed = seed
        self.control = control
        self.passes = passes
        self.verdicts: dict[str, int] = {}
        self.failures: list[str] = []
        self.notes: list[str] = []
        self._began = self._told = time.monotonic()

    @property
    def tried(self) -> int:
        """How many trials have been counted."""
        return sum(self.verdicts.values())

    def count(self, verdict: str, detail: str = "", *, times: int = 1) -> None:
        """Count a trial, or `times` of them; `detail` says of a failure how to see it again."""
        self.verdicts[verdict] = self.verdicts.get(verdict, 0) + times
        if verdict not in self.passes and len(self.failures) < SHOWN_FAILURES:
            self.failures.append(f"{verdict}: {detail}")
        now = time.monotonic()
        if now - self._told >= _EVERY_SECONDS:
            self._told = now
            sys.stderr.write(f"{self.fault}: {self.tried} tried, {self.verdicts}, {now - self._began:.0f} s\n")
            sys.stderr.flush()

    def result(self) -> Campaign:
        """The campaign as it stands now."""
        return Campaign(
            fault=self.fault,
            promise=self.promise,
            tried=self.tried,
            passed=sum(number for verdict, number in self.verdicts.items() if verdict in self.passes),
            verdicts=dict(sorted(self.verdicts.items())),
            seconds=round(time.monotonic() - self._began, 1),
            seed=self.seed,
            control=self.control,
            failures=tuple(self.failures),
            notes=tuple(self.notes),
        )
