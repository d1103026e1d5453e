"""Compiles: whether an answer is a program that runs to its end and defines what was asked for.

Idea: first the syntax tree is made here, which runs nothing; then the program runs by itself in the sandbox, where its
exit code and what it prints say nothing. A program that leaves early, by whatever door, has not run to its end.
Equation: 1 if it is Python, defines the function and runs to its end, else 0; `partial`: (rungs reached) / 3
Source: Predibase, reinforcement fine-tuning of PyTorch to Triton (the compilation reward)
Cost: one process in the sandbox, about ten milliseconds.
Use when: as the gate below passes_tests.
Not when: it is the only reward for programs: an empty program compiles too, so name the function.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any, final

from pydantic import Field

from luthier.core.errors import RecipeError
from luthier.data.cells import name_of
from luthier.data.programs import defined, parsed, program_in
from luthier.data.sample import Sample
from luthier.rewards import Reward, RewardError, Score, Tools, Verdict
from luthier.sandbox.program import Call, Limits, Outcome, Program, Status

_RUNGS = ("python", "defined", "ran")


@final
class Compiles(Reward):
    """Whether a program runs."""

    function: str = Field("", description="what it has to define; empty: nothing, unless a column says so")
    column: str = Field("", description="the column with the name of what it has to define")
    partial: bool = Field(False, description="whether being Python, and defining the function, give a third each")
    seconds: float = Field(5.0, gt=0, description="the longest it may run")
    memory_megabytes: int = Field(512, ge=16, description="the most memory it may use")

    requires = frozenset({"sandbox"})

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,) if self.column else ()

    def check(self, facts: Mapping[str, Any]) -> None:
        if self.column and facts[self.column] != "":  # nothing is asked to be defined there
            name_of(facts, self.column)

    def score(self, samples: Sequence[Sample], tools: Tools) -> list[Verdict]:
        if tools.sandbox is None:
            raise RecipeError("the reward compiles needs the sandbox", allowed="a machine that has one")
        limits = Limits(self.seconds, self.seconds, self.memory_megabytes << 20)
        names = [str(sample.fact(self.column)) if self.column else self.function for sample in samples]
        read = [_read(sample.said, name) for sample, name in zip(samples, names, strict=True)]
        programs = {at: _asked(each, names[at]) for at, each in enumerate(read) if isinstance(each, str)}
        outcomes = tools.sandbox(limits).run_all(list(programs.values())) if programs else []
        ran = dict(zip(programs, outcomes, strict=True))
        return [self._ended(sample, ran[at]) if at in ran else self._stopped(read[at])
                for at, sample in enumerate(samples)]  # fmt: skip

    def _ended(self, sample: Sample, outcome: Outcome) -> Verdict:
        if outcome.status is Status.BROKEN:
            return RewardError(f"the sandbox broke: {outcome.reason}").of(sample)
        if outcome.status is Status.ENDED and not any(answer.error for answer in outcome.returned):
            return self._score(3, "")
        return self._score(2, f"{outcome.status}: {outcome.reason or outcome.raised or 'it was not there in the end'}")

    def _stopped(self, read: str | tuple[int, str]) -> Score:
        return self._score(*read) if isinstance(read, tuple) else self._score(0, "")

    def _score(self, reached: int, told: str) -> Score:
        value = reached / len(_RUNGS) if self.partial else float(reached == len(_RUNGS))
        return Score(value, {name: float(at < reached) for at, name in enumerate(_RUNGS)}, told, told)


def _asked(program: str, name: str) -> Program:
    """The program as a module in which the function is looked up; as a script where there is none to look up."""
    return Program(program, (Call(f"{name}.__repr__"),) if name else ())


def _read(said: str, name: str) -> str | tuple[int, str]:
    """The program, or how many rungs it has reached without being run, and why no more."""
    program = program_in(said)
    if program is None:
        return 0, "there is no program"
    tree = parsed(program)
    if not isinstance(tree, ast.Module):
        return 0, f"it is no Python: {tree}"
    return program if not name or name in defined(tree) else (1, f"it does not define {name}")
