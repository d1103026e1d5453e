"""Kernel speed: how many times as fast as the PyTorch program a kernel is, where it computes the same.

Idea: reference and answer are timed in one process, the reference first and forgotten before the answer is read
(`kernels/race.py`); another process has the reference in both places. A round counts by its median, and of each program
the fastest round, since other work on the machine only ever adds. Every repetition has inputs that were drawn after the
answer was written; what it gave is looked at when the clocks have stopped, at places told then, beside what the other
process gives. How much less work the first process was than the other one is seen from outside too: by the kernel's
account of processor time, on a GPU by our own clock. What was gained on the inner clock and not there, in a race and in
one four times as long, is time that was hidden, and pays nothing. On a GPU it takes kernels of Triton; with `device:
cpu` programs of PyTorch. Under Triton's interpreter time means nothing: without a GPU value and the part `timed` are 0,
and that is said.
Equation: log(s) / log(most), within 0 and 1, with s = min_rounds median t_reference / min_rounds median t_answer; 0
where an answer is wrong or s < least
Source: Ouyang et al., arXiv 2502.10517 (KernelBench); Predibase, reinforcement fine-tuning of PyTorch to Triton
Cost: two processes in turn, and two of four times the length where time seems hidden. In one of the first (rounds + 1)
    x repeats calls of the answer, and as many of the reference in each place of it.
Use when: kernels are right (above the reward `kernel`, behind its gate) and shall be fast.
Not when: the GPU trains or serves at the same time: a reference that then differs threefold is no verdict.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from statistics import median
from typing import Any, Final, Literal, final

from pydantic import Field

from luthier.core.errors import DataError, RecipeError, SandboxUnavailableError
from luthier.data.cases import Sameness, shown
from luthier.data.cells import name_of, program_of
from luthier.data.kernel_programs import (
    MAKES,
    PRECISE,
    START_SECONDS,
    gpus_for,
    is_of_the_gpu,
    kernel_form,
    torch_form,
    why_no_kernel_runs,
    why_not,
)
from luthier.data.sample import Sample
from luthier.rewards import Reward, RewardError, Score, Tools, Verdict
from luthier.sandbox.program import Call, Limits, Outcome, Program, Returned, Status
from luthier.sandbox.sandbox import Sandbox

_PRELOAD: Final = {
    "cpu": ("torch", "torch.overrides"),
    "cuda": ("torch", "torch.overrides", "triton", "triton.language"),
}
_MAKE: Final = {"cpu": "CpuStopwatch()", "cuda": "cuda_stopwatch()"}
_PLACES: Final = 64
"""Values of each repetition that are looked at."""
_NOISE: Final = 3.0
"""Two processes with one reference that differ by more than this say nothing."""
_LEAST_GAP: Final = 2e-4
"""Seconds by which two rounds differ from outside for no reason."""
_SHARE: Final = 0.01
"""Of the processor time of a process: what two that do the same may differ by."""
_LEAST_TIME: Final = 2e-7
"""Seconds that no call of a function takes less than."""
_PROCESSES: Final = 64
_LONGER: Final = 4
"""Times as many repetitions has a race that looks again at an answer which seems to hide time."""
Run = Callable[[Program], Outcome]


@final
class KernelSpeed(Reward):
    """How much faster than the reference."""

    column: str = Field("function", min_length=1, description="the column with the name of the function to write")
    reference: str = Field("reference", min_length=1, description="the column with the PyTorch program of that name")
    timed: str = Field(
        "timed", min_length=1,
        description="the column with its arguments: a list of sizes for each tensor of normal numbers, or a number",
    )  # fmt: skip
    device: Literal["auto", "cuda", "cpu"] = Field(
        "auto", description="cuda times kernels of Triton, cpu programs of PyTorch; auto: cuda where there is a GPU"
    )
    rounds: int = Field(3, ge=3, le=100, description="how many rounds are timed, after one that is not")
    repeats: int = Field(5, ge=2, le=100, description="how many repetitions a round has, each on inputs of its own")
    least: float = Field(1.1, ge=1, description="how many times as fast it has to be to get anything")
    most: float = Field(8.0, gt=1, description="how many times as fast gets 1; beyond it the part suspicious is 1")
    absolute: float = Field(1e-4, ge=0, description="how far off a right value may be")
    relative: float = Field(1e-3, ge=0, lt=1, description="how far off, as a share of the right value")
    seconds: float = Field(60.0, gt=0, description="the longest that all of it may take; on a GPU a minute more")
    memory_megabytes: int = Field(4096, ge=256, description="the most memory it may use")

    requires = frozenset({"sandbox"})

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column, self.reference, self.timed)

    def check(self, facts: Mapping[str, Any]) -> None:
        program_of(facts, self.reference, name_of(facts, self.column))
        self._arguments(facts[self.timed])

    def score(self, samples: Sequence[Sample], tools: Tools) -> list[Verdict]:
        if tools.sandbox is None:
            raise RecipeError("the reward kernel_speed needs the sandbox", allowed="a machine that has one")
        lent = gpus_for(self.device)
        if self.device == "cuda" and not lent:
            raise SandboxUnavailableError(
                "there is no GPU of NVIDIA here, no triton, or a PyTorch without CUDA",
                allowed="device: cpu for PyTorch, or auto",
            )
        if self.device == "auto" and not lent:
            told = "not timed: there is no GPU, and under Triton's interpreter time says nothing"
            return [self._untimed(sample, told) for sample in samples]
        # One at a time: whatever runs beside it is timed too.
        runner = partial(self._runner, tools.sandbox, lent)
        return [self._one(sample, runner, "cuda" if lent else "cpu", _secret(sample, tools)) for sample in samples]

    def _runner(self, opened: Callable[..., Sandbox], lent: tuple[str, ...], times: int) -> Run:
        """What runs a program that may take so many times as long as the knobs say."""
        device = "cuda" if lent else "cpu"
        seconds = self.seconds * times + START_SECONDS[device]
        limits = Limits(seconds, seconds, self.memory_megabytes << 20, processes=_PROCESSES)
        return opened(limits, preload=_PRELOAD[device], environment=PRECISE if lent else (), devices=lent).run

    def _untimed(self, sample: Sample, told: str) -> Score:
        for column in self.columns:
            sample.fact(column)
        return Score(0.0, _parts(timed=0.0), told)

    def _one(self, sample: Sample, runner: Callable[[int], Run], device: str, secret: bytes) -> Verdict:
        name, reference = str(sample.fact(self.column)), str(sample.fact(self.reference))
        arguments = self._arguments(sample.fact(self.timed))
        race = _Race(name, reference, arguments, device, self.rounds + 1, self.repeats, secret)
        form = torch_form(sample.said, name) if device == "cpu" else kernel_form(sample.said, name)
        if form.trouble:
            return Score(0.0, _parts(), form.trouble, form.trouble)
        verdict = self._raced(race, form.program, runner(1), sample)
        if not _accused(verdict):
            return verdict
        # Who hides time hides the more of it the more calls there are. What other work takes from a process once, as at
        # its start, stays what it is.
        longer = replace(race, repeats=_LONGER * race.repeats)
        again = self._raced(longer, form.program, runner(_LONGER), sample)
        if isinstance(again, Score) and not _accused(again):
            told = "processor time went elsewhere in one race and not in the next"
            return RewardError(told, do="let the machine do less else").of(sample)
        return again

    def _raced(self, race: _Race, answer: str, run: Run, sample: Sample) -> Verdict:
        """The verdict on one race."""
        device, reference = race.device, race.reference
        said, known = run(race.with_(answer)), run(race.with_(reference))
        for outcome in (said, known):
            if outcome.status is Status.BROKEN:
                return RewardError(f"the sandbox broke: {outcome.reason}").of(sample)
        own = _failed(known, 0, race.calls) or _failed(said, 0, race.second)
        other = _failed(said, race.second, race.calls)
        if device == "cuda" and (own or other) and (lacking := why_no_kernel_runs(run)):
            told = f"no kernel runs on this GPU behind the walls: {lacking}"
            return RewardError(told).of(sample, again=False)
        if own and device == "cuda" and is_of_the_gpu(own):
            return RewardError(f"the GPU has no room for the reference: {own}", do="leave it some").of(sample)
        if own:
            raise DataError(f"{self.reference} fails on {self.timed}: {own}", allowed="a program that can be timed")
        if other:
            return Score(0.0, _parts(), other, other)
        if told := self._wrong(said.returned[-1].value, known.returned[-1].value):
            return Score(0.0, _parts(), told, told)
        return self._verdict(_Result(race, said, known), sample)

    def _arguments(self, given: Any) -> list[Any]:
        if not isinstance(given, list) or not any(isinstance(each, list) for each in given) or not all(
            isinstance(size, int | float) for each in given for size in (each if isinstance(each, list) else [each])
        ):  # fmt: skip
            raise DataError(f"{self.timed} is {shown(given)}", allowed="sizes and numbers, as in [[1024, 1024], 0.5]")
        return given

    def _wrong(self, said: Any, known: Any) -> str:
        if not isinstance(said, list) or len(said) != len(known):
            return "the race told of other repetitions than were asked for"
        for answer, expected in zip(said, known, strict=True):
            if not isinstance(answer, list) or len(answer) != 4:
                return "the race told of something else than values"
            if answer[:2] != expected[:2]:
                return f"a tensor of {answer[0]} {answer[1]} instead of {expected[0]} {expected[1]}"
            if answer[3] is not True:
                return "it has changed its inputs"
            if not Sameness(self.absolute, self.relative).same(answer[2], expected[2]):
                return "a value of a timed repetition is not that of the reference"
        return ""

    def _verdict(self, result: _Result, sample: Sample) -> Verdict:
        fastest, slowest = min(result.reference), max(result.reference)
        if slowest > _NOISE * fastest:
            told = f"times of the reference differ {slowest / max(fastest, 1e-9):.1f} times"
            return RewardError(told, do="let the machine do less else, or the reference more").of(sample)
        if result.fast.each < _LEAST_TIME:
            # Not left to the outer clock alone, which other work disturbs.
            told = "by the inner clock it takes no time at all"
            return Score(0.0, _parts(1.0, clock=1.0), told, told)
        speedup = fastest / result.fast.each
        if speedup >= self.least and result.hidden > max(result.gained, 0.0) / 2 + result.slack:
            told = f"{result.hidden * 1e3:.1f} of {result.gained * 1e3:.1f} ms by which it is faster went elsewhere"
            # Other work may have taken as much from the answer as from the reference: then nobody knows.
            noise = result.doubt > result.hidden
            return RewardError(told).of(sample) if noise else Score(0.0, _parts(1.0, clock=1.0), told, told)
        value = min(math.log(speedup) / math.log(self.most), 1.0) if speedup >= self.least else 0.0
        told = f"{speedup:.2f} times as fast as the reference"
        return Score(value, _parts(1.0, speedup, float(speedup > self.most)), told, told)


@dataclass(frozen=True)
class _Race:
    """What is asked behind the walls, and where the answers stand."""

    function: str
    reference: str
    arguments: list[Any]
    device: str
    rounds: int
    repeats: int
    secret: bytes
    """What inputs and places are drawn with; nobody knew it when the answer was written."""

    @property
    def second(self) -> int:
        """The number of the call with which the answer enters."""
        return 1 + 2 * self.rounds

    @property
    def calls(self) -> int:
        """How many calls there are."""
        return 2 * self.second + 1

    def with_(self, entrant: str) -> Program:
        """First the reference on inputs of its own, then whoever enters beside it."""
        allowed = None if self.device == "cpu" or entrant is self.reference else list(MAKES)
        look = random.Random(self.secret)
        asked = Call("race.values", ([look.random() for _ in range(_PLACES)],))
        text = files("luthier.kernels").joinpath("race.py").read_text("utf-8")
        return Program(
            f"{text}\n\nrace = Race({_MAKE[self.device]}, {self.arguments!r})\n",
            (*self._laps(self.reference, None, 2), *self._laps(entrant, allowed, 1), asked),
        )

    def pace(self, outcome: Outcome, entered: int) -> _Pace:
        """The times of the program that entered with this call."""
        laps = [outcome.returned[entered + 2 * at + 2] for at in range(1, self.rounds)]
        return _Pace([_claimed(lap, self.repeats) for lap in laps], [lap.seconds for lap in laps])

    def _laps(self, source: str, allowed: list[str] | None, whose: int) -> list[Call]:
        calls = [Call("race.enter", (self.function, source, allowed))]
        for lap in range(self.rounds):
            told = [self.secret[:8] + bytes([whose]) + f"{lap} {at}".encode() for at in range(self.repeats)]
            seeds = [int.from_bytes(hashlib.sha256(each).digest()[:7], "big") for each in told]
            calls += [Call("race.draw", (seeds,)), Call("race.timed")]
        return calls


@dataclass(frozen=True)
class _Result:
    """Two processes that did the same, but for who entered second."""

    race: _Race
    said: Outcome
    known: Outcome

    @property
    def fast(self) -> _Pace:
        return self.race.pace(self.said, self.race.second)

    @property
    def reference(self) -> tuple[float, ...]:
        """Seconds of the reference, wherever it was timed."""
        places = ((self.said, 0), (self.known, 0), (self.known, self.race.second))
        return tuple(self.race.pace(*place).each for place in places)

    @property
    def _instead(self) -> _Pace:
        return self.race.pace(self.known, self.race.second)

    @property
    def gained(self) -> float:
        """Seconds that the answer took less than the reference in its place, by the inner clock."""
        return self._instead.total - self.fast.total

    @property
    def hidden(self) -> float:
        """How many of them are not seen from outside."""
        if self.race.device == "cpu":
            return self.gained - (self.known.cpu_seconds - self.said.cpu_seconds)
        return (self.fast.around - self._instead.around) * len(self.fast.seen)

    @property
    def slack(self) -> float:
        """What they may differ by in any case."""
        return _LEAST_GAP * len(self.fast.seen) + (_SHARE * self.known.cpu_seconds if self.race.device == "cpu" else 0)

    @property
    def doubt(self) -> float:
        """By how much what was done in both processes differs."""
        if self.race.device == "cpu":
            here, there = (self.race.pace(outcome, 0).total for outcome in (self.said, self.known))
            return abs(here / max(there, 1e-9) - 1) * self.known.cpu_seconds
        return self._instead.gap * len(self.fast.seen)


@dataclass(frozen=True)
class _Pace:
    """Seconds of each repetition by the inner clock, round by round, and of each round by ours."""

    claimed: list[list[float]]
    seen: list[float]

    @property
    def each(self) -> float:
        return min(map(median, self.claimed))

    @property
    def total(self) -> float:
        return sum(map(sum, self.claimed))

    @property
    def _around(self) -> list[float]:
        return [seen - sum(claimed) for seen, claimed in zip(self.seen, self.claimed, strict=True)]

    @property
    def around(self) -> float:
        """What a round takes besides."""
        return min(self._around)

    @property
    def gap(self) -> float:
        """By how much that differs between rounds of one program."""
        return max(self._around) - min(self._around)


def _claimed(lap: Returned, repeats: int) -> list[float]:
    """What the inner clock says; nonsense is no time at all, which pays nothing."""
    said = lap.value
    if isinstance(said, list) and len(said) == repeats and all(isinstance(each, float) and each >= 0 for each in said):
        return said
    return [0.0] * repeats


def _accused(verdict: Verdict) -> bool:
    """Whether an answer is said to have hidden time."""
    return isinstance(verdict, Score) and verdict.parts["hack/clock"] > 0


def _failed(outcome: Outcome, first: int, end: int) -> str:
    """Why the calls from `first` to before `end` have not all been answered; empty where they have."""
    calls = outcome.returned[first:end]
    told = next((each.error for each in calls if each.error is not None), "")
    return told or ("" if len(calls) == end - first else why_not(outcome))


def _secret(sample: Sample, tools: Tools) -> bytes:
    text = f"{tools.seed} {tools.step} {sample.answer}".encode("utf-8", "replace")
    return hashlib.sha256(text).digest()


def _parts(
    correct: float = 0.0, speedup: float = 0.0, suspicious: float = 0.0, *, clock: float = 0.0, timed: float = 1.0
) -> dict[str, float]:
    return {"timed": timed, "correct": correct, "speedup": speedup, "suspicious": suspicious, "hack/clock": clock}
