"""Compiles: what runs to its end, what only looks so, and what the sandbox itself does wrong."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from luthier.core.errors import RecipeError
from luthier.rewards import RewardError, Tools
from luthier.rewards.compiles import Compiles
from luthier.sandbox.program import Outcome, Program, Status
from tests.rewards.samples import failure, sample, sandbox_tools, score

KNOBS: dict[str, Any] = {"function": "add"}
GOOD = sample("```python\ndef add(a, b):\n    return a + b\n```")
BAD = sample("```python\ndef add(a, b)\n    return a + b\n```")
make_tools = sandbox_tools


@pytest.mark.parametrize(
    ("program", "reached"),
    [
        ("def add(a, b):\n    return a + b", 3),
        ("add = lambda a, b: a + b", 3),
        ("from operator import add", 3),
        ("def add(a, b):\n    return nonsense", 3),
        ("import sys\ndef add(): pass\nif __name__ == '__main__':\n    sys.exit(0)", 3),
        ("def add(a, b):\n    return a + b\nraise ValueError('x')", 2),
        ("import sys\ndef add(): pass\nsys.exit(0)", 2),
        ("import os\ndef add(): pass\nos._exit(0)", 2),
        ("def add(): pass\nwhile True: pass", 2),
        ("def add(): pass\ndel add", 2),
        ("import nowhere\ndef add(): pass", 2),
        ("def sub(): pass", 1),
        ("x = 'def add(): pass'", 1),
        ("def add(:", 0),
        ("(" * 5000, 0),
        ("\0", 0),
        ("", 0),
    ],
)
def test_each_rung_is_reached_by_what_is_true_of_the_program(program: str, reached: int) -> None:
    """Breaks when leaving early counts as an end, or a name in a text as a function."""
    found = score(Compiles(function="add", partial=True, seconds=1.0), sample(program), sandbox_tools())
    assert found.value == pytest.approx(reached / 3)
    assert list(found.parts.values()) == [float(at < reached) for at in range(3)]
    assert bool(found.reason) == (reached < 3) or not program


def test_without_a_name_a_script_has_to_end_and_a_column_may_name_it() -> None:
    tools = sandbox_tools()
    assert score(Compiles(), sample("print(1)"), tools).value == 1.0
    assert score(Compiles(), sample("raise KeyError"), tools).value == 0.0
    for name, value in (("add", 1.0), ("sub", 0.0)):
        assert score(Compiles(column="entry"), sample(GOOD.answer, entry=name), tools).value == value


@dataclass
class Broken:
    """A sandbox whose outcomes are as told; it counts what it was asked."""

    outcomes: list[Outcome]
    asked: list[Program] = field(default_factory=list)

    def run_all(self, programs: list[Program]) -> list[Outcome]:
        self.asked += programs
        return [self.outcomes[at % len(self.outcomes)] for at in range(len(programs))]

    def run(self, program: Program) -> Outcome:
        return self.run_all([program])[0]

    def tools(self) -> Tools:
        return Tools(sandbox=lambda limits, **more: self)  # type: ignore[arg-type,return-value]


def test_a_broken_sandbox_is_no_verdict() -> None:
    """Breaks when what the sandbox does wrong is scored: the program would get 0 for it."""
    broken = Broken([Outcome(Status.BROKEN, reason="no zygote"), Outcome(Status.ENDED)])
    first, second = Compiles().score([GOOD, GOOD], broken.tools())
    assert isinstance(first, RewardError) and first.again and "no zygote" in str(first)
    assert not isinstance(second, RewardError)
    assert isinstance(failure(Compiles(), GOOD, broken.tools()), RewardError)


def test_what_is_no_python_is_not_run_at_all() -> None:
    broken = Broken([Outcome(Status.ENDED)])
    Compiles(function="add").score([BAD, sample("def sub(): pass"), GOOD], broken.tools())
    assert len(broken.asked) == 1
    with pytest.raises(RecipeError, match="sandbox"):
        Compiles().score([GOOD], Tools())
