"""Performance: how much faster than a known program an answer is, where it is right.

Idea: both programs get the same calls, whose arguments are drawn after the answer is there. Each run is a process of
its own; runs alternate (baseline, answer, baseline, ...), the clock is ours, and of several runs the fastest counts,
since other work on the machine only ever adds. Every value of every timed run must be the one the baseline gave, so
there is no run that is only timed. Whatever the answer does before its first call beyond what the baseline does there
is added to its time, and more processor time than its wall time can hold is a refusal.
Equation: log(s) / log(most), within 0 and 1, with s = min_k t_baseline / min_k t_answer; 0 where s < least or wrong
Source: Ouyang et al., arXiv 2502.10517 (KernelBench: fast_p, and its catalogue of ways to cheat)
Cost: 2 k + 1 runs of about the baseline's time, one after the other.
Use when: programs are right and shall be faster; on a machine that does little else, above passes_tests.
Not when: a run takes less than some milliseconds: starting to measure takes as long, so let a case call for more.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from pydantic import Field

from luthier.core.errors import DataError, RecipeError
from luthier.data.cases import Sameness, shown
from luthier.data.cells import program_of
from luthier.data.programs import program_in
from luthier.data.sample import Sample
from luthier.rewards import Reward, RewardError, Score, Tools, Verdict
from luthier.sandbox.program import Call, Limits, Outcome, Program, Status
from luthier.sandbox.sandbox import Sandbox

_CORES = 1
_EXCESS, _START = 1.2, 0.1
"""Share of processor time over wall time, and seconds of it that starting may take."""
_NOISE = 3.0
"""Runs of one baseline that differ by more than this say nothing."""


@final
class Performance(Reward):
    """How much faster than the baseline."""

    function: str = Field(min_length=1, description="the function that is called in both programs")
    baseline: str = Field("baseline", min_length=1, description="the column with the program to beat")
    inputs: str = Field(
        "inputs", min_length=1, description="the column with Python text in which draw(seed) gives a list of arguments"
    )
    repeats: int = Field(3, ge=1, le=50, description="how many runs of the answer, each between two of the baseline")
    least: float = Field(1.05, ge=1, description="how many times as fast it has to be to get anything")
    most: float = Field(4.0, gt=1, description="how many times as fast gets 1; beyond it the part suspicious is 1")
    seconds: float = Field(10.0, gt=0, description="the longest that one run may take")
    memory_megabytes: int = Field(1024, ge=16, description="the most memory it may use")

    requires = frozenset({"sandbox"})

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.baseline, self.inputs)

    def check(self, facts: Mapping[str, Any]) -> None:
        program_of(facts, self.baseline, self.function)
        program_of(facts, self.inputs, "draw")

    def score(self, samples: Sequence[Sample], tools: Tools) -> list[Verdict]:
        if tools.sandbox is None:
            raise RecipeError("the reward performance needs the sandbox", allowed="a machine that has one")
        sandbox = tools.sandbox(Limits(self.seconds, self.seconds, self.memory_megabytes << 20))
        return [self._one(sample, sandbox, tools) for sample in samples]

    def _one(self, sample: Sample, sandbox: Sandbox, tools: Tools) -> Verdict:
        baseline, program = str(sample.fact(self.baseline)), program_in(sample.said)
        inputs = Program(str(sample.fact(self.inputs)), (Call("draw", (_seed(sample, tools),)),))
        if program is None:
            return Score(0.0, _parts(), "there is no program", "there is no program")
        try:
            calls = self._calls(sandbox.run(inputs))
            race = self._race(sandbox, Program(baseline, calls), Program(program, calls))
        except _BrokenError as failure:
            return RewardError(f"the sandbox broke: {failure}").of(sample)
        if race.noise > _NOISE:
            told = f"runs of the baseline differ {race.noise:.1f} times"
            return RewardError(told, do="let the machine do less else, or the baseline more").of(sample)
        return self._verdict(race)

    def _calls(self, drawn: Outcome) -> tuple[Call, ...]:
        _unbroken(drawn)
        given = drawn.returned[0].value if drawn.returned and drawn.returned[0].error is None else None
        if not isinstance(given, list) or not given or not all(isinstance(each, list | tuple) for each in given):
            why = drawn.returned[0].error if drawn.returned else drawn.reason or drawn.raised
            raise DataError(f"{self.inputs} drew {shown(given)} ({why})", allowed="a list of lists of arguments")
        return tuple(Call(self.function, tuple(each)) for each in given)

    def _race(self, sandbox: Sandbox, baseline: Program, program: Program) -> _Race:
        """Runs in turn. It ends with the first that is wrong: the others would only take time."""
        slow = [_unbroken(sandbox.run(baseline))]
        fast: list[Outcome] = []
        known = self._known(slow[0])
        for _ in range(self.repeats):
            fast.append(_unbroken(sandbox.run(program)))
            if trouble := _trouble(fast[-1], known):
                return _Race(slow, fast, trouble)
            slow.append(_unbroken(sandbox.run(baseline)))
            if _trouble(slow[-1], known):
                raise DataError(f"{self.baseline} gives other values the second time", allowed="a program that repeats")
        return _Race(slow, fast, "")

    def _known(self, outcome: Outcome) -> list[Any]:
        if outcome.status is not Status.ENDED or any(each.error is not None for each in outcome.returned):
            told = next((each.error for each in outcome.returned if each.error), outcome.reason)
            raise DataError(f"{self.baseline}: {outcome.status}: {told}", allowed="a program that answers every input")
        return [each.value for each in outcome.returned]

    def _verdict(self, race: _Race) -> Score:
        if race.trouble:
            return Score(0.0, _parts(), race.trouble, race.trouble)
        speedup = race.speedup
        value = min(math.log(speedup) / math.log(self.most), 1.0) if speedup >= self.least else 0.0
        told = f"{speedup:.2f} times as fast as the baseline"
        return Score(value, _parts(1.0, speedup, float(speedup > self.most)), told, told)


class _BrokenError(Exception):
    """The sandbox failed."""


@dataclass(frozen=True)
class _Race:
    """All runs, and what was wrong with the answer's values."""

    slow: list[Outcome]
    fast: list[Outcome]
    trouble: str

    @property
    def speedup(self) -> float:
        usual = min(map(_before, self.slow))
        return min(map(_asked, self.slow)) / min(_asked(run) + max(_before(run) - usual, 0.0) for run in self.fast)

    @property
    def noise(self) -> float:
        times = [_asked(run) for run in self.slow]
        return 1.0 if max(times) < 0.02 else max(times) / min(times)


def _asked(outcome: Outcome) -> float:
    """Seconds between questions and answers."""
    return max(sum(each.seconds for each in outcome.returned), 1e-6)


def _before(outcome: Outcome) -> float:
    """Seconds beside them: starting, and what a program does when it is imported."""
    return max(outcome.seconds - _asked(outcome), 0.0)


def _trouble(outcome: Outcome, known: list[Any]) -> str:
    answers = outcome.returned
    if outcome.status is not Status.ENDED or len(answers) != len(known):
        return f"{outcome.status}: {outcome.reason or outcome.raised or f'{len(answers)} of {len(known)} answered'}"
    for at, (said, right) in enumerate(zip(answers, known, strict=True)):
        if said.error is not None or not said.crosses:
            return f"input {at}: {said.error or 'a value that is no plain data'}"
        if not Sameness(relative=1e-6).same(said.value, right):
            return f"input {at}: another value than the baseline's"
    if outcome.cpu_seconds > _EXCESS * outcome.seconds * _CORES + _START:
        return f"{outcome.cpu_seconds:.2f} s of processor time in {outcome.seconds:.2f} s"
    return ""


def _unbroken(outcome: Outcome) -> Outcome:
    if outcome.status is Status.BROKEN:
        raise _BrokenError(outcome.reason)
    return outcome


def _seed(sample: Sample, tools: Tools) -> int:
    """A number that nobody knew when the answer was written, and that a resumed run draws again."""
    text = f"{tools.seed} {tools.step} {sample.answer}".encode("utf-8", "replace")
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "big")


def _parts(correct: float = 0.0, speedup: float = 0.0, suspicious: float = 0.0) -> dict[str, float]:
    return {"correct": correct, "speedup": speedup, "suspicious": suspicious}
