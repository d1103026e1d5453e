"""Performance: right and faster gets more, whatever else gets nothing; the machine's noise is no verdict."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.core.errors import DataError, RecipeError
from luthier.rewards import Tools
from luthier.rewards.performance import Performance
from luthier.sandbox.program import Outcome, Returned, Status
from tests.rewards.samples import failure, sample, sandbox_tools, score
from tests.rewards.test_compiles import Broken

BASELINE = "def f(n):\n    total = 0\n    for i in range(n):\n        total += i * i\n    return total"
INPUTS = """
import random

def draw(seed):
    r = random.Random(seed)
    return [[r.randint(300_000, 400_000)] for _ in range(3)]
"""
CLOSED = "def f(n):\n    return (n - 1) * n * (2 * n - 1) // 6"
ROW = {"baseline": BASELINE, "inputs": INPUTS}
KNOBS: dict[str, Any] = {"function": "f", "repeats": 2, "least": 1.5, "most": 2.0}
GOOD, BAD = sample(CLOSED, **ROW), sample("def f(n):\n    return 0", **ROW)
make_tools = sandbox_tools


def test_faster_gets_more_and_the_same_or_slower_nothing() -> None:
    """Breaks when the ratio is upside down, or noise is paid."""
    tools = sandbox_tools()
    found = score(Performance(**KNOBS), GOOD, tools)
    assert found.value == 1.0 and found.parts["correct"] == found.parts["suspicious"] == 1.0 < found.parts["speedup"]
    for program in (BASELINE, BASELINE.replace("total += i * i", "total += i * i\n        total += 0")):
        assert score(Performance(**KNOBS), sample(program, **ROW), tools).value == 0.0


def test_what_is_done_before_the_first_call_counts() -> None:
    table = "T = [0]\nfor i in range(400_001):\n    T.append(T[-1] + i * i)\n\ndef f(n):\n    return T[n]"
    assert score(Performance(**KNOBS), sample(table, **ROW), sandbox_tools()).parts["speedup"] < 1.5


def raced(*times: float, cpu: float = 0.0, value: int = 1) -> Broken:
    """A sandbox that draws one input, then answers in these times: baseline, answer, baseline, ..."""
    runs = [Outcome(Status.ENDED, returned=(Returned(1 if at % 2 == 0 else value, seconds=each),), seconds=each + 0.01,
                    cpu_seconds=cpu if at % 2 else each) for at, each in enumerate(times)]  # fmt: skip
    return Queued([Outcome(Status.ENDED, returned=(Returned([[3]]),)), *runs])


class Queued(Broken):
    """Outcomes one after the other."""

    def run(self, program: Any) -> Outcome:
        self.asked.append(program)
        return self.outcomes[len(self.asked) - 1]


@pytest.mark.parametrize(
    ("times", "value"),
    [((4.0, 2.0, 4.1, 2.2, 4.0), 0.5), ((4.0, 1.0, 4.0, 1.0, 4.0), 1.0), ((4.0, 0.1, 4.0, 0.1, 4.0), 1.0),
     ((4.0, 3.9, 4.0, 3.9, 4.0), 0.0), ((4.0, 9.0, 5.0, 2.0, 4.4), 0.5), ((4.0, 8.0, 4.0, 8.0, 4.0), 0.0)],
)  # fmt: skip
def test_the_fastest_of_each_counts_on_a_scale_of_logarithms(times: tuple[float, ...], value: float) -> None:
    """Breaks when means are compared: one slow run would decide."""
    one = sample("def f(n): pass", **ROW)
    found = score(Performance(function="f", repeats=2), one, raced(*times).tools())
    assert found.value == pytest.approx(value)
    assert found.parts["suspicious"] == float(min(times[1::2]) < 1.0)


def test_more_processor_time_than_wall_time_holds_is_refused() -> None:
    """Breaks when work in other processes or threads is not looked at."""
    one = sample("def f(n): pass", **ROW)
    found = score(Performance(function="f", repeats=1), one, raced(4.0, 1.0, 4.0, cpu=3.0).tools())
    assert found.value == 0.0 and "processor time" in found.reason


def test_values_are_checked_in_every_timed_run() -> None:
    one = sample("def f(n): pass", **ROW)
    queue = raced(4.0, 1.0, 4.0, 1.0, 4.0)
    queue.outcomes[4] = Outcome(Status.ENDED, returned=(Returned(7, seconds=1.0),), seconds=1.0)
    found = score(Performance(function="f", repeats=2), one, queue.tools())
    assert found.value == 0.0 and found.parts["correct"] == 0.0 and len(queue.asked) == 5


def test_noise_and_a_broken_sandbox_are_no_verdict() -> None:
    one = sample("def f(n): pass", **ROW)
    assert "differ" in str(failure(Performance(function="f", repeats=1), one, raced(1.0, 1.0, 9.0).tools()))
    broken = Broken([Outcome(Status.BROKEN, reason="no zygote")])
    assert failure(Performance(function="f"), one, broken.tools()).again


def test_inputs_are_drawn_after_the_answer_and_again_alike() -> None:
    """Breaks when the seed is fixed (an answer could hold the results), or a resumed run draws others."""
    made = Performance(function="f", repeats=1)

    def seed(answer: str, **more: int) -> int:
        queue = raced(1.0, 1.0, 1.0)
        made.score([sample(answer, **ROW)], Tools(sandbox=lambda limits: queue, **more))  # type: ignore[arg-type,return-value]
        return queue.asked[0].calls[0].arguments[0]

    assert seed("def f(): pass") == seed("def f(): pass") != seed("def f(): return")
    assert len({seed("x", step=1), seed("x", step=2), seed("x", seed=1), seed("x")}) == 4


@pytest.mark.parametrize(
    ("column", "text", "part"),
    [
        ("inputs", "def draw(seed):\n    return []", "inputs drew"),
        ("inputs", "def draw(seed):\n    return [1]", "inputs drew"),
        ("inputs", "def draw(seed):\n    raise KeyError('x')", "KeyError"),
        ("inputs", "x = 1", "inputs drew"),
        ("baseline", "def f(n):\n    raise KeyError('x')", "baseline: ended: KeyError"),
    ],
)
def test_a_row_that_cannot_be_raced_is_the_fault_of_the_row(column: str, text: str, part: str) -> None:
    with pytest.raises(DataError, match=part):
        score(Performance(**KNOBS), sample(CLOSED, **{**ROW, column: text}), sandbox_tools())


def test_a_baseline_that_does_not_repeat_is_the_fault_of_the_row() -> None:
    queue = raced(4.0, 1.0, 4.0)
    queue.outcomes[3] = Outcome(Status.ENDED, returned=(Returned(7, seconds=1.0),), seconds=1.0)
    with pytest.raises(DataError, match="second time"):
        score(Performance(function="f", repeats=1), sample("def f(n): pass", **ROW), queue.tools())


def test_no_program_and_no_sandbox() -> None:
    assert score(Performance(**KNOBS), sample("```json\n{}\n```", **ROW), Broken([]).tools()).value == 0.0
    with pytest.raises(RecipeError, match="sandbox"):
        Performance(**KNOBS).score([GOOD], Tools())
