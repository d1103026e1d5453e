"""Passes tests: what cases say, how values are compared, and that nothing tried is nothing passed."""

from __future__ import annotations

import math
from typing import Any

import pytest

from luthier.core.errors import DataError, RecipeError
from luthier.rewards import RewardError, Score, Tools
from luthier.rewards.passes_tests import PassesTests
from luthier.sandbox.program import Outcome, Returned, Status
from tests.rewards.samples import failure, sample, sandbox_tools, score
from tests.rewards.test_compiles import Broken

CASES = [
    {"function": "add", "arguments": [2, 3], "expected": 5},
    {"function": "add", "arguments": [], "keywords": {"a": "x", "b": "y"}, "expected": "xy"},
    {"function": "add", "arguments": [[1], [2]], "expected": [1, 2]},
]
KNOBS: dict[str, Any] = {}
GOOD = sample("```python\ndef add(a, b):\n    return a + b\n```", tests=CASES)
BAD = sample("```python\ndef add(a, b):\n    return b + a\n```", tests=CASES)
make_tools = sandbox_tools


def ends(found: Score) -> list[str]:
    """How the program ended, out of the parts; each part is there, so that means over answers are shares."""
    statuses = {name.removeprefix("status/"): value for name, value in found.parts.items() if name != "passed"}
    assert set(statuses) == {str(status) for status in Status} - {"broken"}
    return [name for name, value in statuses.items() if value]


def test_all_or_each_case_counts() -> None:
    tools = sandbox_tools()
    assert ends(score("passes_tests", GOOD, tools)) == ["ended"]
    found = score("passes_tests", BAD, tools)
    assert found.value == 0.0 and found.parts["passed"] == pytest.approx(1 / 3)
    assert score(PassesTests(partial=True), BAD, tools).value == pytest.approx(1 / 3)
    assert "case 1: gave 'yx'" in found.reason and "xy" not in found.feedback


@pytest.mark.parametrize(
    ("body", "expected", "value"),
    [
        ("1", 1, 1.0),
        ("True", 1, 0.0),
        ("1", True, 0.0),
        ("1.0", 1, 0.0),
        ("1", 1.0, 0.0),
        ("0.1 + 0.2", 0.3, 1.0),
        ("0.30001", 0.3, 0.0),
        ("float('nan')", 0.3, 0.0),
        ("float('nan')", math.nan, 1.0),
        ("float('inf')", 1e308, 0.0),
        ("float('inf')", math.inf, 1.0),
        ("-float('inf')", math.inf, 0.0),
        ("(1, 2)", [1, 2], 1.0),
        ("[1, 2]", [1, 2], 1.0),
        ("[1, True]", [1, 1], 0.0),
        ("[[1], [2]]", [[1], [2]], 1.0),
        ("[1]", 1, 0.0),
        ("1", [1], 0.0),
        ("'1'", 1, 0.0),
        ("b'a'", "a", 0.0),
        ("{'a': 1}", {"a": 1}, 1.0),
        ("{'a': 1.0}", {"a": 1}, 0.0),
        ("{'b': 1, 'a': 2}", {"a": 2, "b": 1}, 1.0),
        ("{True: 1}", {1: 1}, 0.0),
        ("{1, 2}", [1, 2], 0.0),
        ("range(3)", [0, 1, 2], 0.0),
        ("(x for x in [1, 2])", [1, 2], 0.0),
        ("None", None, 1.0),
        ("None", 0, 0.0),
        ("object()", None, 0.0),
        ("10 ** 30", 10**30, 1.0),
        ("10 ** 5000", 1, 0.0),
        ("{10 ** 5000: [10 ** 5000]}", {}, 0.0),
        ("'\\ud800'", "?", 0.0),
    ],
)
def test_values_are_compared_by_kind_and_value(body: str, expected: Any, value: float) -> None:
    """Breaks when True passes for 1, NaN for anything, or a list of one number for the number."""
    one = sample(f"def f():\n    return {body}", tests=[{"function": "f", "expected": expected}])
    assert score("passes_tests", one, sandbox_tools()).value == value


def test_looser_and_stricter_comparison_are_knobs() -> None:
    tools = sandbox_tools()
    for knobs, body, expected, value in (
        ({"loose_numbers": True}, "2", 2.0, 1.0), ({"loose_numbers": True}, "True", 1, 0.0),
        ({"strict_tuples": True}, "(1,)", [1], 0.0), ({"absolute": 0.1}, "0.35", 0.3, 1.0),
        ({"relative": 0.1}, "105.0", 100.0, 1.0),
    ):  # fmt: skip
        one = sample(f"def f():\n    return {body}", tests=[{"expected": expected}])
        assert score(PassesTests(function="f", **knobs), one, tools).value == value, (knobs, body)


def test_scripts_are_told_by_what_they_print() -> None:
    """Breaks when an exit code decides, white space at the end does, or a crash after the right words passes."""
    tools, cases = sandbox_tools(), [{"stdin": "2 3\n", "stdout": "5\n"}, {"stdin": "4 5\n", "stdout": "9"}]
    for program, share in (
        ("a, b = map(int, input().split())\nprint(a + b, ' ')", 1.0), ("print(5)", 0.5), ("print(5, end='')", 0.5),
        ("print('5 9')", 0.0), ("a, b = map(int, input().split())\nprint(a + b)\nraise ValueError", 0.0),
        ("import os\nprint(5, flush=True)\nos._exit(0)", 0.0), ("pass", 0.0),
    ):  # fmt: skip
        assert score(PassesTests(partial=True), sample(program, tests=cases), tools).value == share, program


def test_calls_and_scripts_may_be_mixed() -> None:
    program = "def add(a, b):\n    return a + b\nif __name__ == '__main__':\n    print(add(*map(int, input().split())))"
    cases = [CASES[0], {"stdin": "2 3", "stdout": "5"}, CASES[1]]
    assert score("passes_tests", sample(program, tests=cases), sandbox_tools()).value == 1.0


def test_what_stands_before_the_program_comes_from_a_column() -> None:
    one = sample("def f():\n    return helper() + 1", tests=[{"function": "f", "expected": 3}],
                 before="def helper():\n    return 2")  # fmt: skip
    assert score(PassesTests(setup="before"), one, sandbox_tools()).value == 1.0


def test_a_call_that_was_never_answered_has_failed() -> None:
    """Breaks when calls that were not reached are left out of the total."""
    program = "import os\ndef add(a, b):\n    return os._exit(0) if isinstance(a, str) else a + b"
    found = score(PassesTests(partial=True), sample(program, tests=CASES), sandbox_tools())
    assert found.value == pytest.approx(1 / 3) and "not answered" in found.reason
    assert found.parts["status/exited"] == 1.0


ADD = "def add(a, b):\n    return a + b"
ASSERTIONS = "assert add(2, 3) == 5\nassert add('a', 'b') == 'ab'"


@pytest.mark.parametrize(
    ("program", "tests", "share"),
    [
        (ADD, ASSERTIONS, 1.0),
        (ADD, "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(1, 3) == 4", 1.0),
        ("def add(a, b):\n    return b + a", ASSERTIONS, 0.5),
        ("class Same:\n    __eq__ = lambda *both: True\n\ndef add(a, b):\n    return Same()", ASSERTIONS, 0.0),
        ("import os\ndef add(a, b):\n    os._exit(0)", ASSERTIONS, 0.0),
        ("def sub(a, b):\n    return a - b", ASSERTIONS, 0.0),
        ("def add(:", ASSERTIONS, 0.0),
        ("x = '\ud800'", ASSERTIONS, 0.0),
        ("# " + "x" * 300_000, ASSERTIONS, 0.0),
    ],
)
def test_assertions_reach_the_program_by_questions_only(program: str, tests: str, share: float) -> None:
    """Breaks when tests and program share a process, or a program that cannot cross ends the run."""
    found = score(PassesTests(function="add", partial=True), sample(program, tests=tests), sandbox_tools())
    assert found.value == share == found.parts["passed"]
    found = score(PassesTests(function="add"), sample(program, tests=tests), sandbox_tools())
    assert found.value == float(share == 1.0)


@pytest.mark.parametrize("tests", ["x = 1", "assert (", "# nothing"])
def test_a_text_without_an_assertion_is_the_fault_of_the_row(tests: str) -> None:
    with pytest.raises(DataError, match="has no test"):
        score("passes_tests", sample(ADD, tests=tests), sandbox_tools())


@pytest.mark.parametrize(
    "tests", [[], "", " ", None, {}, [1], [{"arguments": [1]}], [{"expected": 1}], [{"expected": 1, "function": ""}],
              [{"function": "f", "arguments": 1, "expected": 1}], [{"function": "f", "expected": 1, "weight": 2}]]
)  # fmt: skip
def test_a_row_without_a_test_is_the_fault_of_the_row(tests: Any) -> None:
    """Breaks when a row with nothing to try passes, or fails every answer in silence."""
    with pytest.raises(DataError, match="tests"):
        score("passes_tests", sample(GOOD.answer, tests=tests), sandbox_tools())


def test_a_broken_sandbox_is_no_verdict() -> None:
    """Breaks when an infrastructure error is scored, be it in one of several scripts."""
    answered = Outcome(Status.ENDED, returned=(Returned(5), Returned("xy"), Returned([1, 2])))
    broken = Outcome(Status.BROKEN, reason="no memory for a zygote")
    assert failure("passes_tests", GOOD, Broken([broken]).tools()).again
    assert score("passes_tests", GOOD, Broken([answered]).tools()).value == 1.0
    scripts = sample("print(1)", tests=[{"stdout": "1"}, {"stdout": "1"}])
    one_of_two = Broken([Outcome(Status.ENDED, stdout="1"), broken]).tools()
    assert isinstance(failure("passes_tests", scripts, one_of_two), RewardError)
    with pytest.raises(RecipeError, match="sandbox"):
        PassesTests().score([GOOD], Tools())


@pytest.mark.parametrize("status", [status for status in Status if status not in (Status.ENDED, Status.BROKEN)])
def test_every_end_of_a_program_but_the_sandbox_s_own_is_its_own_fault(status: Status) -> None:
    found = score("passes_tests", GOOD, Broken([Outcome(status)]).tools())
    assert found.parts["passed"] == 0.0 and ends(found) == [str(status)]
