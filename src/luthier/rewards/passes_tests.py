"""Passes tests: whether a program does what its hidden cases say.

Idea: the program gets arguments and gives values back; what is expected, how it is compared and the verdict stay in
this process. Values arrive as plain data, built anew, and are compared type by type, so an object that says it is equal
to everything is no value at all. Exit codes and words such as "5 passed" are not looked at. Tests that are written as
assertions run in a process of their own, which reaches the program only by questions and answers.
Equation: 1 if all cases are passed, else 0; `partial`: (cases passed) / (cases)
Source: Chen et al., arXiv 2107.03374 (HumanEval); Le et al., arXiv 2207.01780 (CodeRL)
Cost: one process in the sandbox for all calls of a program, one for each case that is a script's input.
Use when: tasks have hidden cases, best drawn anew for each run; above compiles and no_cheating in a ladder.
Not when: the cases stand in the prompt: then they are learned by heart.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from pydantic import Field

from luthier.core.errors import DataError, RecipeError
from luthier.data.cases import Case, Sameness, cases_of, same_text, shown
from luthier.data.cells import text_of
from luthier.data.programs import LONGEST, parsed, program_in
from luthier.data.sample import Sample
from luthier.rewards import Reward, RewardError, Score, Tools, Verdict
from luthier.sandbox.program import Examination, Limits, Outcome, Program, Returned, Status

_STATUSES = tuple(status for status in Status if status is not Status.BROKEN)


@final
class PassesTests(Reward):
    """How many hidden cases a program passes."""

    column: str = Field("tests", min_length=1, description="the column with cases, or with assertions as Python text")
    function: str = Field("", description="the function that cases call which do not name one")
    setup: str = Field("", description="a column with Python text that stands before the program: imports, helpers")
    partial: bool = Field(False, description="whether each case gives its share")
    absolute: float = Field(0.0, ge=0, description="how far off a right float may be")
    relative: float = Field(1e-9, ge=0, lt=1, description="how far off, as a share of the right float")
    loose_numbers: bool = Field(False, description="whether 2 may come for 2.0; True never comes for 1")
    strict_tuples: bool = Field(False, description="whether a tuple is wrong where a list is expected")
    seconds: float = Field(5.0, gt=0, description="the longest that all calls of a program may take together")
    memory_megabytes: int = Field(512, ge=16, description="the most memory it may use")

    requires = frozenset({"sandbox"})

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.column, self.setup)))

    def check(self, facts: Mapping[str, Any]) -> None:
        given = facts[self.column]
        self._cases(given)
        if self.setup:
            text_of(facts, self.setup)
        if isinstance(given, str) and (why := _untested(given)):
            raise DataError(f"{self.column} has no test: {given[:80]!r} ({why})", allowed="one or more assertions")

    def score(self, samples: Sequence[Sample], tools: Tools) -> list[Verdict]:
        if tools.sandbox is None:
            raise RecipeError("the reward passes_tests needs the sandbox", allowed="a machine that has one")
        sandbox = tools.sandbox(Limits(self.seconds, self.seconds, self.memory_megabytes << 20))
        trials = [self._trial(sample) for sample in samples]
        programs = [program for trial in trials for program in trial.programs]
        outcomes = iter(sandbox.run_all(programs) if programs else [])
        asked = [(Program(trial.source), trial.assertions, self.function) for trial in trials
                 if trial.assertions and trial.source is not None]  # fmt: skip
        examined = iter(sandbox.examine_all(asked) if asked else [])
        found: list[Verdict] = []
        for trial in trials:
            if trial.assertions and trial.source is not None:
                found.append(self._examined(trial, next(examined)))
            else:
                found.append(self._verdict(trial, [next(outcomes) for _ in trial.programs]))
        return found

    def _trial(self, sample: Sample) -> _Trial:
        """What of a sample is to be run. Raises DataError for a row without a test."""
        given, before = sample.fact(self.column), str(sample.fact(self.setup)) if self.setup else ""
        cases = self._cases(given)
        program = program_in(sample.said)
        if program is not None and (len(program) > LONGEST or not _is_text(program)):
            # It would be refused at the border, and a refusal must not look like a fault of the row.
            program = None
        source = program if program is None or not before else f"{before}\n\n{program}"
        trial = _Trial(sample, source, cases, given if isinstance(given, str) else "")
        if source is not None and cases:
            calls = tuple(case.call for case in cases if case.call is not None)
            trial.programs += [Program(source, calls)] * bool(calls)
            trial.programs += [Program(source, stdin=case.stdin) for case in cases if case.call is None]
        return trial

    def _cases(self, given: Any) -> list[Case]:
        """The cases of a cell; none where it is assertions. Raises DataError for a cell without a test."""
        if isinstance(given, str) and not given.strip():
            raise DataError(f"{self.column} is {given!r}", allowed="assertions, or a list of cases")
        return [] if isinstance(given, str) else cases_of(given, self.column, self.function)

    def _examined(self, trial: _Trial, found: Examination) -> Verdict:
        if found.status is Status.BROKEN or found.candidate.status is Status.BROKEN:
            return RewardError(f"the sandbox broke: {found.reason}").of(trial.sample)
        if found.total == 0:
            what = f"{trial.assertions[:80]!r} ({found.reason})" if found.reason else repr(trial.assertions[:80])
            raise DataError(f"{self.column} has no test: {what}", allowed="one or more assertions")
        passed = found.passed if found.status is Status.ENDED or self.partial else 0
        failed = next((at for at, case in enumerate(found.cases) if not case.passed), None)
        why = "" if failed is None else found.cases[failed].reason or found.reason or "it does not hold"
        return self._score(passed, found.total, f"case {failed}: {why}" if why else "", found.candidate.status)

    def _verdict(self, trial: _Trial, outcomes: list[Outcome]) -> Verdict:
        if broken := [outcome.reason for outcome in outcomes if outcome.status is Status.BROKEN]:
            return RewardError(f"the sandbox broke: {broken[0]}").of(trial.sample)
        total = len(trial.cases) or 1
        if trial.source is None:
            return self._score(0, total, "there is no program that can be run", Status.REFUSED)
        troubles = [self._trouble(case, said) for case, said in trial.pairs(outcomes)]
        wrong = [f"case {at}: {told}" for at, told in enumerate(troubles) if told]
        worst = next((outcome.status for outcome in outcomes if outcome.status is not Status.ENDED), Status.ENDED)
        return self._score(total - len(wrong), total, wrong[0] if wrong else "", worst)

    def _trouble(self, case: Case, said: Returned | Outcome) -> str:
        """What is wrong with what a program gave; it does not say what was expected."""
        if isinstance(said, Outcome):
            if said.status is not Status.ENDED:
                return f"{said.status}: {said.reason or said.raised}"
            return "" if same_text(said.stdout, case.stdout) else f"printed {said.stdout[:80]!r}"
        if said.error is not None:
            return said.error[:200]
        if not said.crosses:
            return "gave a value that is no plain data"
        form = Sameness(self.absolute, self.relative, self.loose_numbers, self.strict_tuples)
        return "" if form.same(said.value, case.expected) else f"gave {shown(said.value)}"

    def _score(self, passed: int, total: int, told: str, status: Status) -> Score:
        share = passed / total
        # All of them, so that a mean over answers is the share of those that ended so.
        parts = {"passed": share} | {f"status/{each}": float(each is status) for each in _STATUSES}
        return Score(share if self.partial else float(passed == total), parts, told, told)


def _untested(assertions: str) -> str:
    """Why a text can hold no test at all; empty where it may. What is a test is known when it is run."""
    if len(assertions) > LONGEST:
        return ""
    tree = parsed(assertions)
    if isinstance(tree, str):
        return tree
    tests = any(isinstance(node, ast.Assert | ast.ClassDef) for node in ast.walk(tree))
    named = any(isinstance(node, ast.FunctionDef) and node.name.startswith("test") for node in tree.body)
    return "" if tests or named else "nothing is asserted"


def _is_text(program: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in program)


@dataclass
class _Trial:
    """A sample, its program, its tests, and what of it is to be run."""

    sample: Sample
    source: str | None
    cases: list[Case]
    assertions: str
    programs: list[Program] = field(default_factory=list)

    def pairs(self, outcomes: list[Outcome]) -> list[tuple[Case, Returned | Outcome]]:
        """Each case with what came of it. A call that was never answered has failed, whatever became of the rest."""
        called = [case for case in self.cases if case.call is not None]
        first = outcomes[0] if called else None
        answers: Mapping[int, Returned] = dict(enumerate(first.returned)) if first is not None else {}
        why = f"not answered; {first.status}: {first.reason or first.raised}" if first is not None else ""
        pairs: list[tuple[Case, Returned | Outcome]] = [
            (case, answers.get(at, Returned(error=why))) for at, case in enumerate(called)
        ]
        scripts = [case for case in self.cases if case.call is None]
        return [*pairs, *zip(scripts, outcomes[1:] if called else outcomes, strict=True)]
