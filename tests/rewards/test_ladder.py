"""Ladder: what counts, what is not even asked, and what stays visible."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from luthier.core.chosen import choose
from luthier.core.errors import RecipeError
from luthier.rewards import Environment, Reward, RewardError, Score, Tools
from luthier.rewards.ladder import ladder_of
from tests.rewards.samples import failure, sample, score

RUNGS: list[Any] = [
    {"method": "format", "tags": ("answer",), "outside": True, "weight": 0.1},
    {"method": "contains", "phrases": ("yes", "no"), "need": "share", "gate": True, "pass_at": 0.5},
    {"method": "exact_match", "name": "right", "weight": 2.0},
]
KNOBS: dict[str, Any] = {"rungs": RUNGS}
GOOD = sample("<answer>yes no</answer>", answer="<answer>yes no</answer>")
BAD = sample("maybe", answer="<answer>yes no</answer>")


@pytest.mark.parametrize(
    ("said", "known", "value", "right"),
    [
        ("<answer>yes no</answer>", "<answer>yes no</answer>", 0.1 + 1 + 2, 1.0),
        ("yes", "yes", 0.5 + 2, 1.0),
        ("<answer>maybe</answer>", "<answer>maybe</answer>", 0.1, 0.0),
        ("yes no", "no", 1.0, 0.0),
        ("nothing", "nothing", 0.0, 0.0),
    ],
)
def test_later_rungs_count_only_above_passed_gates(said: str, known: str, value: float, right: float) -> None:
    """Breaks when a weight is forgotten, a gate lets through, or a rung that is no gate stops."""
    found = score(ladder_of(RUNGS), sample(said, answer=known))
    assert found.value == pytest.approx(value) and found.parts["right"] == right
    assert {"format", "contains", "right", "contains/found"} <= set(found.parts)


def test_an_environment_is_no_rung_and_has_a_ladder_for_a_reward() -> None:
    """Breaks when an environment among rungs is taken and never played, or advice is given that is refused."""
    format_: dict[str, Any] = {"method": "format", "tags": ("answer",), "outside": True}
    rungs: list[Any] = [{"method": "calculator", "reward": "numeric"}, format_]
    for name in ("calculator", "sums"):
        with pytest.raises(RecipeError, match=f"the rung '{name}' is an environment") as told:
            ladder_of([{"reward": rungs[0], **({} if name == "calculator" else {"name": name})}, rungs[1]])
        assert "{method: calculator, reward: {method: ladder, rungs: [...]}}" in str(told.value)
    around = {"method": "calculator", "reward": {"method": "ladder", "rungs": ["numeric", rungs[1]]}}
    made = choose("rewards", Reward, around)
    assert isinstance(made, Environment)
    found = score(made, sample("<answer>4</answer> #### 4", answer="4"))
    assert found.value == 2.0 and {"numeric", "format", "calls"} <= set(found.parts)


def test_what_is_not_reached_is_not_asked() -> None:
    """Breaks when a rung behind a gate sees an answer: a row without the column would be an error."""
    found = score(ladder_of(RUNGS), sample("nothing"))
    assert found.value == 0.0 and found.parts["right"] == 0.0
    assert "contains" in found.reason and "right" not in found.reason


def test_a_rung_that_fails_is_the_failure_of_the_sample_and_no_zero() -> None:
    """Breaks when a failed rung counts 0 and the rest is paid."""
    rungs = [{"method": "format", "pattern": "yes"}, {"method": "length"}]
    assert "tokens" in str(failure(ladder_of(rungs), sample("yes", tokens=0)))
    [one, two] = ladder_of(rungs).score([sample("yes", tokens=0), sample("yes")], Tools())
    assert isinstance(one, RewardError) and isinstance(two, Score) and two.value == 1.0


def test_a_rung_that_does_not_apply_neither_counts_nor_stops(tmp_path: Any) -> None:
    """Breaks when None is 0, or a gate that does not apply closes."""
    (tmp_path / "none.py").write_text("def none(completions):\n    return [None] * len(completions)\n")
    none = {"method": "function", "path": f"{tmp_path}/none.py:none", "gate": True}
    assert score(ladder_of([none, {"method": "format", "pattern": "yes"}]), sample("yes")).value == 1.0
    assert ladder_of([none]).score([sample("yes")], Tools()) == [None]


def test_bounds_columns_and_needs_are_those_of_the_rungs() -> None:
    made = ladder_of([*RUNGS, {"method": "length", "weight": 0.5}])
    assert made.bounds == pytest.approx((-0.5, 3.1)) and made.columns == ("answer",) and made.needs == frozenset()


def test_a_ladder_is_written_as_a_recipe_and_read_again() -> None:
    made = ladder_of(RUNGS)
    assert choose("rewards", Reward, made.as_recipe()) == made


@pytest.mark.parametrize(
    ("rung", "advice"),
    [
        ({"method": "calculator", "reward": "numeric"},
         "{method: calculator, reward: {method: ladder, rungs: [numeric, length]}}"),
        ({"method": "numeric", "reward": "exact_match"}, "{method: numeric, weight: 0.5}"),
        ({"method": "calculater", "reward": "numeric"}, "calculator"),
    ],
)  # fmt: skip
def test_a_rung_with_method_and_reward_is_told_how_to_write_it(rung: dict[str, Any], advice: str) -> None:
    """Breaks when a reward that has a reward of its own cannot be found out how to write, or the advice is refused."""
    with pytest.raises(RecipeError) as failure:
        ladder_of([rung, {"method": "length"}])
    assert advice in failure.value.told() and "--dry-run" not in failure.value.told()
    if advice[0] == "{":
        assert choose("rewards", Reward, yaml.safe_load(advice.replace(", weight: 0.5", "")))


def test_names_are_told_apart_and_wrong_knobs_are_told() -> None:
    for rungs, part in (
        ([*RUNGS, RUNGS[0]], "two rungs are called 'format'"),
        ([{"method": "format", "tag": "a"}], "tags"),
        ([{"method": "formal"}], "format"),
        ([], "rungs"),
        ([{"weight": 1.0}], "reward is missing"),
    ):
        with pytest.raises((RecipeError, ValueError), match=part):
            ladder_of(rungs)
