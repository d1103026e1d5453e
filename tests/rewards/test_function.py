"""Function: reward functions written for TRL work as they are, and what they do wrong is told."""

from __future__ import annotations

import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from luthier.core.chosen import choose
from luthier.core.errors import RecipeError
from luthier.rewards import Reward, RewardError, Score, Tools
from luthier.rewards.function import Function
from luthier.train.scoring import Scoring
from tests.rewards.samples import failure, sample, score

FILE = Path(__file__).with_name("trl_functions.py")
KNOBS: dict[str, Any] = {"path": f"{FILE}:capitals", "least": 0.0, "most": 1.0}
GOOD, BAD = sample("ABC"), sample("abc")
ROWS = [sample("Paris", answer="Paris"), sample("Rome", answer="Paris")]


def of(name: str, **knobs: Any) -> Function:
    return Function(path=f"{FILE}:{name}", **knobs)


def values(reward: Function, samples: list[Any], tools: Tools | None = None) -> list[Any]:
    return [getattr(verdict, "value", verdict) for verdict in reward.score(samples, tools or Tools())]


def test_columns_and_conversations_arrive_as_in_trl() -> None:
    """Breaks when a completion is no list of messages, or a column no list of its rows."""
    assert values(of("same_as_column"), ROWS) == [1.0, 0.0]
    assert of("same_as_column").columns == ("answer",)


def test_plain_prompts_arrive_as_texts() -> None:
    """Breaks when a text becomes messages, or the other way round without being asked."""
    plain = [replace(one, prompt="Capital?") for one in ROWS]
    assert values(of("types"), plain) == [1.0, 1.0] and values(of("types"), ROWS) == [2.0, 2.0]
    assert values(of("types", form="messages"), plain) == [2.0, 2.0]
    assert values(of("types", form="text"), ROWS) == [1.0, 1.0]


def test_tokens_progress_and_logs_are_there() -> None:
    """Breaks when completion_ids, trainer_state, log_extra or log_metric are missing."""
    [one, two] = of("everything").score(ROWS, Tools(step=3, steps=10))
    assert isinstance(one, Score) and isinstance(two, Score)
    assert [one.value, two.value] == [5 + 0.3, 4 + 0.3]
    assert one.parts == {"seen": 2.0, "letters": 5.0} and two.parts == {"seen": 2.0, "letters": 4.0}


def test_it_may_be_async_and_may_be_made_by_another() -> None:
    assert values(of("later"), ROWS) == [5.0, 4.0]
    assert values(of("make", arguments={"factor": 2.0}), ROWS) == [10.0, 8.0]


def test_none_does_not_apply_and_numbers_of_torch_do() -> None:
    assert values(of("sometimes"), ROWS) == [1.0, None]
    assert values(of("tensors"), ROWS) == [5.0, 4.0]


def test_arrays_are_taken_as_in_trl() -> None:
    """Breaks when a function that gives an array of numpy or torch, as in TRL, has to be rewritten."""
    assert values(of("array"), ROWS) == values(of("tensor"), ROWS) == [5.0, 4.0]
    assert "tensor([[0." in str(failure(of("table"), ROWS[0]))


def test_too_few_numbers_are_not_asked_for_again_one_by_one() -> None:
    """Breaks when a function that gives one number for a batch looks right, since it is asked about each alone."""
    scored = Scoring(of("short")).score(ROWS)
    assert scored.scores == (None, None) and scored.retried == 0 and "1 values for 2 samples" in scored.told


def test_one_that_leaves_has_failed_and_ends_nothing() -> None:
    """Breaks when sys.exit(0) in a reward ends the run as if all were well."""
    told = str(failure(of("leaves"), ROWS[0]))
    assert "it left with sys.exit(0)" in told and re.search(r"trl_functions.py, line \d+", told), told


def test_one_that_hangs_has_failed_and_other_alarms_go_on() -> None:
    """Breaks when a function that never comes back keeps a run for ever, or takes the alarm of somebody else away."""
    rung: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: rung.append(number))
    timer = signal.setitimer(signal.ITIMER_REAL, 0.6)
    try:
        assert "TimeoutError: it took longer than 0.2 s" in str(failure(of("hangs", seconds=0.2), ROWS[0]))
        assert not rung
        time.sleep(0.8)
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, before)
    assert rung == [signal.SIGALRM]


def test_in_another_thread_it_is_called_without_an_alarm() -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(values, of("letters"), ROWS).result() == [5.0, 4.0]


def test_a_file_is_read_as_a_script_is(tmp_path: Path) -> None:
    """Breaks when data classes, or a neighbour of the file, are not found."""
    assert values(of("weighed"), ROWS) == [2.0, 2.0]
    (tmp_path / "a_neighbour_of_rewards.py").write_text("WORTH = 3.0\n")
    file = tmp_path / "rewards_with_a_neighbour.py"
    file.write_text("from a_neighbour_of_rewards import WORTH\ndef f(completions):\n    return [WORTH, WORTH]\n")
    assert values(Function(path=f"{file}:f"), ROWS) == [3.0, 3.0]


@pytest.mark.parametrize(
    ("text", "part"),
    [("import nowhere_to_be_found", "ModuleNotFoundError"), ("def f(completions) return 1", "SyntaxError"),
     ("\n1 / 0", "ZeroDivisionError: division by zero (broken.py, line 2)"),
     ("import sys; sys.exit(0)", "SystemExit: 0")],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_told_and_ends_nothing_as_if_well(text: str, part: str, tmp_path: Path) -> None:
    """Breaks when a mistake in somebody's file is called a fault of ours, or sys.exit(0) a success."""
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(RecipeError, match="try it: python") as told:
        choose("rewards", Reward, {"method": "function", "path": f"{tmp_path / 'broken.py'}:f"})
    assert part in str(told.value) and f"function: {tmp_path}" in str(told.value)


@pytest.mark.parametrize(
    ("name", "part"), [("raises", "KeyError: 'nowhere'"), ("short", "1 values for 2"), ("texts", "gave 'good'"),
                       ("nothing", "gave None")],
)  # fmt: skip
def test_what_goes_wrong_is_an_error_of_each_sample_and_no_number(name: str, part: str) -> None:
    """Breaks when an exception becomes 0, or ends the run."""
    verdicts = of(name).score(ROWS, Tools())
    assert all(isinstance(verdict, RewardError) and part in str(verdict) for verdict in verdicts), verdicts
    assert [verdict.sample for verdict in verdicts if isinstance(verdict, RewardError)] == ROWS


def test_a_number_out_of_bounds_is_an_error() -> None:
    assert "from 0 to 1" in str(failure(of("letters", least=0.0, most=1.0), ROWS[0]))
    assert "from 0 to 1" in str(failure(of("not_a_number", least=0.0, most=1.0), ROWS[0]))
    for name in ("not_a_number", "infinite", "huge"):
        assert failure(of(name), ROWS[0]).sample is ROWS[0]
    assert score(of("letters"), ROWS[0]).value == 5.0


@pytest.mark.parametrize(
    ("path", "part"),
    [("", "path is ''"), ("rewards.py", "path is"), ("nowhere.py:f", "no file"), (f"{FILE}:letter", "letters"),
     (f"{FILE}:CONSTANT", "CONSTANT")],
)  # fmt: skip
def test_a_path_that_leads_nowhere_is_told(path: str, part: str) -> None:
    with pytest.raises((RecipeError, ValueError), match=part):
        Function(path=path)


def test_rewards_of_trl_itself_give_what_they_give_there() -> None:
    """Breaks when TRL's own functions cannot be named in a recipe."""
    rewards = pytest.importorskip("trl.rewards", reason="trl is not installed")
    path = Path(str(rewards.__file__)).with_name("format_rewards.py")
    form = Function(path=f"{path}:think_format_reward")
    assert values(form, [sample("<think>a</think>b"), sample("b")]) == [1.0, 0.0]
