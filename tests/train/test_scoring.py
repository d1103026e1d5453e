"""Scoring: what fails is asked about again, then left out and counted; it is never a 0."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, final
from unittest.mock import Mock

import pytest
from pydantic import Field

from luthier.core.chosen import choose
from luthier.core.errors import DataError, RecipeError, RefusedError, SandboxUnavailableError
from luthier.data.sample import Sample
from luthier.rewards import Reward, RewardError, Score, Tools, Verdict
from luthier.rewards.ladder import ladder_of
from luthier.sandbox.program import Limits, Program, Status
from luthier.train import scoring
from luthier.train.scoring import Sandboxes, Scoring, with_sandbox

ASKED: Counter[str] = Counter()
BATCHES: list[int] = []


@final
class Fragile(Reward):
    """Answers are numbers that it gives back, "broken" fails, "flaky" fails `times` times, "poison" takes all along."""

    times: int = Field(1, description="how often a flaky sample fails")

    def score(self, samples: Sequence[Sample], tools: Tools) -> list[Verdict]:
        BATCHES.append(len(samples))
        ASKED.update(sample.answer for sample in samples)
        if any(sample.answer == "poison" for sample in samples):
            raise RewardError("the service is down")
        return [self._one(sample) for sample in samples]

    def _one(self, sample: Sample) -> Verdict:
        if sample.answer == "none":
            return None
        if sample.answer == "final":
            return RewardError("it cannot be").of(sample, again=False)
        if sample.answer == "broken" or (sample.answer == "flaky" and ASKED["flaky"] <= self.times):
            return RewardError("the sandbox broke").of(sample)
        value = 5.0 if sample.answer == "flaky" else float(sample.answer)
        return Score(value, {"half": value / 2})


@pytest.fixture(autouse=True)
def _fresh() -> None:
    ASKED.clear()
    BATCHES.clear()


def samples(*answers: str) -> list[Sample]:
    return [Sample(prompt="?", answer=answer) for answer in answers]


def test_a_failure_that_passes_costs_nothing() -> None:
    """Breaks when one failure excludes a sample, or the others are asked about again."""
    for times in (1, 2):
        ASKED.clear()
        found = Scoring(Fragile(times=times)).score(samples("1", "flaky", "2"))
        assert [score and score.value for score in found.scores] == [1.0, 5.0, 2.0]
        assert {"1": 1, "flaky": times + 1, "2": 1} == ASKED and not found.failures


def test_what_stays_broken_is_left_out_and_counted_and_never_a_zero() -> None:
    """Breaks when an infrastructure error becomes a reward: means and scores would show it."""
    asked = samples("1", "broken", "3", "none", "final")
    found = Scoring(Fragile()).score(asked)
    assert [score and score.value for score in found.scores] == [1.0, None, 3.0, None, None]
    assert found.means == {"reward": 2.0, "half": 1.0}
    assert found.counts == {"samples": 5, "failed": 2, "unasked": 1, "retried": 2}
    assert [failure.sample for failure in found.failures] == [asked[1], asked[4]]
    assert ASKED["broken"] == 3 and ASKED["1"] == ASKED["final"] == ASKED["none"] == 1
    assert found.told == "1 x the sandbox broke; 1 x it cannot be" and found.advice == ""
    advised = replace(found, failures=(RewardError("a", do="first"), *[RewardError("b", do="do that")] * 2))
    assert advised.advice == "do that"


def test_one_sample_cannot_take_its_batch_with_it() -> None:
    """Breaks when a reward that raises for a batch excludes all of it."""
    found = Scoring(Fragile()).score(samples("1", "poison", "2"))
    assert [score and score.value for score in found.scores] == [1.0, None, 2.0]
    assert BATCHES == [3, 3, 1, 1, 1] and len(found.failures) == 1
    assert found.failures[0].sample == samples("poison")[0]


@pytest.mark.parametrize("said", ["nan", "inf", "-inf"])
def test_a_number_that_is_not_finite_is_a_failure(said: str) -> None:
    """Breaks when NaN is trained on, or made 0."""
    found = Scoring(Fragile()).score(samples("1", said))
    assert found.scores[1] is None and len(found.failures) == 1 and not math.isnan(found.means["reward"])


def test_without_retries_and_without_samples() -> None:
    assert Scoring(Fragile(), retries=0).score(samples("flaky")).counts["retried"] == 0
    assert Scoring(Fragile()).score([]).scores == () and Scoring(Fragile()).score([]).means == {}


def test_rewards_are_told_the_step() -> None:
    """Breaks when a reward that changes with training sees its beginning for ever."""

    class Step(Reward):
        def score(self, samples: Sequence[Sample], tools: Tools) -> list[Verdict]:
            return [Score(tools.step / tools.steps) for _ in samples]

    asked = Scoring(Step(), Tools(step=2, steps=10))
    assert asked.score(samples("1")).means == {"reward": 0.2}
    assert asked.score(samples("1"), step=5).means == {"reward": 0.5}


def test_faults_of_rows_and_recipes_are_no_failures_of_samples() -> None:
    """Breaks when a missing column excludes every sample in silence."""

    class Blind(Reward):
        def score(self, samples: Sequence[Sample], tools: Tools) -> list[Verdict]:
            return [samples[0].fact("tests")]

    with pytest.raises(DataError, match="tests"):
        Scoring(Blind()).score(samples("1"))

    class Short(Reward):
        def score(self, samples: Sequence[Sample], tools: Tools) -> list[Verdict]:
            return []

    with pytest.raises(RecipeError, match="0 verdicts on 1"):
        Scoring(Short()).score(samples("1"))


DRAW = "def draw(seed):\n    return [[seed]]"
REFERENCE = "def f(x):\n    return x"
OF_KERNELS: dict[str, Any] = {"function": "f", "reference": REFERENCE, "inputs": DRAW, "timed": [[8], 0.5]}


@pytest.mark.parametrize(
    ("reward", "good", "bad", "part"),
    [
        ("numeric", {"answer": "#### 4"}, {"answer": "four"}, "answer is 'four'"),
        ("exact_match", {"answer": ["a", 4]}, {"answer": ["a", ""]}, "answer is"),
        ({"method": "contains", "column": "words"}, {"words": "a"}, {"words": [4]}, "words is"),
        ({"method": "json_schema", "column": "form"}, {"form": True}, {"form": '{"type": "x"}'}, "form.t"),
        ({"method": "json_schema", "column": "form"}, {"form": {}}, {"form": "{"}, "form:1:2"),
        ({"method": "judge", "scale": "pair"}, {"reference": "yes"}, {"reference": " "}, "reference is"),
        ({"method": "compiles", "column": "f"}, {"f": ""}, {"f": "no name"}, "f is 'no name'"),
        ({"method": "no_cheating", "examples": "e"}, {"e": [[[1], 2]]}, {"e": [[1]]}, "e is"),
        ({"method": "no_cheating", "baseline": "b"}, {"b": ""}, {"b": None}, "b is None"),
        ("passes_tests", {"tests": "assert f()"}, {"tests": []}, "tests is"),
        ("passes_tests", {"tests": [{"stdout": "1"}]}, {"tests": 5}, "tests is 5"),
        ("passes_tests", {"tests": "def test_f():\n    f()"}, {"tests": "f()"}, "tests has no test"),
        ("passes_tests", {"tests": "assert f()\n" * 20_000}, {"tests": "# assert f()"}, "tests has no test"),
        ("passes_tests", {"tests": "class T(TestCase): ..."}, {"tests": "assert ("}, "tests has no test"),
        ({"method": "passes_tests", "function": "f"}, {"tests": [{"expected": 1}]}, {"tests": [{}]}, "tests.0. is"),
        ({"method": "performance", "function": "f"}, {"baseline": REFERENCE, "inputs": DRAW},
         {"baseline": REFERENCE, "inputs": "def drew(seed): ..."}, "inputs says nowhere 'draw'"),
        ("kernel", OF_KERNELS, {**OF_KERNELS, "reference": "def f(:"}, "reference is"),
        ("kernel", OF_KERNELS, {**OF_KERNELS, "function": 5}, "function is 5"),
        ("kernel_speed", OF_KERNELS, {**OF_KERNELS, "timed": [3]}, "timed is"),
        ([{"method": "length"}, {"method": "numeric"}], {"answer": 4}, {"answer": None}, "answer is None"),
        ({"method": "calculator", "reward": "numeric"}, {"answer": 4}, {"answer": True}, "answer is True"),
        ({"method": "grader", "grader": {"type": "string_check", "operation": "eq", "input": "{{item.a[0].b}}",
                                         "reference": "{{sample.output_json.a}}"}},
         {"a": [{"b": 1}]}, {"a": [{"c": 1}]}, "a.0.b"),
    ],
)  # fmt: skip
def test_a_cell_that_cannot_be_read_is_told_with_its_row(
    reward: Any, good: dict[str, Any], bad: dict[str, Any], part: str
) -> None:
    """Breaks when a bad row is found only when it is drawn, in the middle of a run, or without its address."""
    scoring = told_of_rows(reward)
    scoring.check([(good, "rows.jsonl:1:1")])
    with pytest.raises(DataError, match=part) as failure:
        scoring.check([(good, "rows.jsonl:1:1"), (bad, "rows.jsonl:2:1")])
    text = failure.value.told()
    assert text.startswith("1 of 2 rows cannot be scored") and "\n  rows.jsonl:2:1: " in text
    assert "rows.jsonl:1:1" not in text and "data check" not in text


def told_of_rows(reward: Any) -> Scoring:
    """A reward with tools that are never asked."""
    return Scoring(ladder_of(reward), Tools(judge=Mock(), sandbox=Mock()))


def test_bad_rows_are_told_together_and_the_others_counted() -> None:
    """Breaks when the first bad row hides the second, a million of them are listed, or rows that lack a column pass."""
    rows: list[tuple[dict[str, Any], str]] = [({"answer": "x"}, f"a.jsonl:{line}:1") for line in range(1, 31)]
    with pytest.raises(DataError) as failure:
        told_of_rows("numeric").check([*rows, ({"answer": 1}, "a.jsonl:31:1"), ({"b": 1}, "a.jsonl:32:1")])
    text = failure.value.told()
    assert text.startswith("31 of 32 rows") and "a.jsonl:20:1" in text and "a.jsonl:21:1" not in text
    assert "(11 more rows)" in text and "take it out of the data" in text.splitlines()[-1]
    with pytest.raises(DataError, match="a.jsonl:2:1: the reward numeric reads the column 'answer'"):
        told_of_rows("numeric").check([({"answer": 1}, "a.jsonl:1:1"), ({"b": 1}, "a.jsonl:2:1")])
    with pytest.raises(RecipeError, match="a.jsonl:1:1: the reward numeric reads the column 'answer'"):
        told_of_rows("numeric").check([({"b": 1}, "a.jsonl:1:1"), ({"b": 1}, "a.jsonl:2:1")])
    told_of_rows("numeric").check([])


def test_a_row_whose_programs_fail_when_they_run_is_told_what_helps() -> None:
    """Breaks when the checks of data, which know nothing of rewards, are the advice."""

    class Runs(Reward):
        def score(self, samples: Sequence[Sample], tools: Tools) -> list[Verdict]:
            raise DataError("inputs drew 5", allowed="a list")

    with pytest.raises(DataError, match="inputs drew 5; a list; mend the row") as failure:
        Scoring(Runs()).score(samples("1"))
    assert "data check" not in failure.value.told()


def test_a_reward_that_runs_programs_gets_walls_before_the_first_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a machine without walls is found out after the first rollout, or walls are built for nobody."""
    runs, reads = choose("rewards", Reward, "compiles"), choose("rewards", Reward, "length")
    plain = Tools(seed=3)
    assert with_sandbox(reads, plain) is plain

    def none(*_: object, **more: object) -> None:
        raise SandboxUnavailableError("no walls stand here: none", allowed="some")

    with monkeypatch.context() as without:
        without.setattr(scoring, "open_sandbox", none)
        with pytest.raises(SandboxUnavailableError, match="no walls"):
            with_sandbox(runs, plain)
    try:
        made = with_sandbox(runs, plain)
    except SandboxUnavailableError as failure:
        pytest.skip(f"no sandbox stands here: {failure}")
    assert made.seed == 3 and with_sandbox(runs, made) is made
    assert Scoring(runs, made).score(samples("x = 1")).means["reward"] == 1.0


def test_sandboxes_are_opened_once_for_their_limits_and_end_together() -> None:
    """Breaks when each batch opens one, or one outlives its run."""
    with Sandboxes() as sandboxes:
        try:
            first = sandboxes(Limits(seconds=2.0))
        except SandboxUnavailableError as failure:
            pytest.skip(f"no sandbox stands here: {failure}")
        assert sandboxes(Limits(seconds=2.0)) is first
        assert first.run(Program("print(1)")).status is Status.ENDED
    with pytest.raises(RefusedError, match="closed"):
        first.run(Program("print(1)"))
