"""Tests run in one process against functions of a candidate in another; what passes between them goes through here.

Idea: tests that share a process with a candidate can be fooled in a hundred ways (patched builtins, objects equal to
everything, `exit(0)`, reading the tests). Here they share nothing. The candidate sees one call after another, as
it would from anybody, and the tests see plain data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, final

from luthier.sandbox.guest.candidate import PLACE
from luthier.sandbox.guest.stand_ins import KINDS
from luthier.sandbox.guest.values import BorderError, unpack_parsed
from luthier.sandbox.guest_process import GuestProcess, OverError
from luthier.sandbox.program import Case, Examination, Limits, Outcome, Program, Status
from luthier.sandbox.running import MOST_SOURCE, Begun, check, line
from luthier.sandbox.zygotes import Zygote

_LATER = 0.25
"""Seconds that the tests may take beyond the candidate, so that its end is told as its own."""


def examine_program(
    zygote: Zygote, examiner: Zygote, program: Program, tests: str, entry: str, limits: Limits, *, writable: bool
) -> Examination:
    """Run `tests` against `program`. Raises LostError or OSError where the sandbox fails."""
    try:
        check(program, writable=writable)
        if len(tests) > MOST_SOURCE:
            raise BorderError(f"{len(tests):,} characters of tests; at most {MOST_SOURCE:,}")
        if entry and PLACE.fullmatch(entry) is None:
            raise BorderError(f"{entry[:80]!r} names no function")
    except BorderError as failure:
        return Examination(Status.REFUSED, reason=str(failure))
    judge_limits = replace(limits, seconds=limits.seconds + _LATER, cpu_seconds=limits.cpu_seconds + _LATER)
    with GuestProcess(examiner, judge_limits) as judge:
        judge.say({"tests": tests, "entry": entry})
        try:
            planned = judge.hear()
        except OverError as over:
            return Examination(over.status, reason=f"the tests: {over.reason}")
        if planned.get("is") != "plan":
            return Examination(Status.REFUSED, reason=line(planned.get("why")))
        with GuestProcess(zygote, limits, program.stdin) as process:
            return _Hearing(judge, process, program).held(planned)


@final
class _Hearing:
    """One examination while it goes on."""

    def __init__(self, judge: GuestProcess, process: GuestProcess, program: Program) -> None:
        self._judge = judge
        self._process = process
        self._program = program
        self._tests: list[str] = []
        self._results: dict[int, tuple[bool, str]] = {}
        self._not_plain = 0
        self._gone: OverError | None = None

    def held(self, planned: Mapping[str, Any]) -> Examination:
        """Let the candidate get ready, the tests ask, and both end."""
        begun = Begun(self._process, self._program, script=False)
        self._take(planned)
        status, reason = Status.ENDED, ""
        try:
            begun.until_ready()
        except OverError as over:
            self._gone = over
        try:
            reason = self._listened()
        except OverError as over:
            status, reason = over.status, f"the tests: {over.reason}"
        candidate = self._ended(begun)
        missing = reason or "not reached"
        cases = tuple(
            Case(test, *self._results.get(number, (False, missing))) for number, test in enumerate(self._tests)
        )
        return Examination(status, cases, candidate, reason, self._not_plain)

    def _listened(self) -> str:
        """Until the tests are over; what they say about that."""
        while True:
            said = self._judge.hear()
            if said.get("is") == "over":
                return line(said.get("why"))
            self._take(said)

    def _take(self, said: Mapping[str, Any]) -> None:
        kind = said.get("is")
        if kind == "plan":
            self._tests = [line(test) for test in said["tests"]]
        elif kind == "case":
            self._results[said["number"]] = (said["passed"] is True, line(said["why"]))
        elif kind == "not-plain":
            self._not_plain += 1
        elif kind == "call":
            self._judge.say(self._asked(said))

    def _asked(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a call of the tests."""
        if self._gone is None:
            try:
                answer = self._process.ask({"do": "call", "watch": True, **{key: said[key] for key in _ASKED}})
                return self._clean(answer, said["arguments"])
            except OverError as over:
                self._gone = over
        return {"gone": f"the candidate is gone: {self._gone.reason}"}

    def _clean(self, answer: Mapping[str, Any], arguments: list[Any]) -> dict[str, Any]:
        """An answer of the candidate as far as it is one: nothing else of it is passed on."""
        if "error" not in answer:
            changed = answer.get("changed", {})
            try:
                if not isinstance(changed, dict) or not set(changed) <= {str(n) for n in range(len(arguments))}:
                    raise BorderError("it changed arguments that it was not given")
                if answer.get("is") not in KINDS:
                    raise BorderError("it gave no answer")
                for tree in (answer.get("value"), *changed.values()):
                    unpack_parsed(tree)
                if answer["is"] == "thing" and type(answer.get("value")) is not int:
                    raise BorderError("it gave a thing without a number")
            except BorderError as failure:
                self._not_plain += 1
                return {"error": f"TypeError: {failure}", "raised": "TypeError"}
            return {"is": answer["is"], "value": answer.get("value"), "changed": changed}
        self._not_plain += answer.get("crosses", True) is not True
        return {"error": line(answer["error"]), "raised": line(answer.get("raised"))}

    def _ended(self, begun: Begun) -> Outcome:
        if self._gone is not None:
            # It left before it was told to: one question at least was not answered.
            return begun.outcome(self._gone, (), asked=1)
        self._process.say({"do": "end"})
        return begun.outcome(self._process.finish(), (), asked=0)


_ASKED = ("how", "function", "of", "arguments", "keywords")
