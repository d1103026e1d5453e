"""Calculator: an episode from its question to its end, and expressions that a model may well write."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.core.chosen import choose
from luthier.core.errors import RecipeError
from luthier.data.conversation import Message, ToolCall
from luthier.data.tool_calls import message_said
from luthier.rewards import Environment, Reward, Score, Tools
from luthier.rewards.calculator import Calculator, calculated
from tests.rewards.samples import QUESTION, sample, score

KNOBS: dict[str, Any] = {"reward": "numeric"}
GOOD = sample("#### 1058", answer="1058")
BAD = sample("#### 1048", answer="1058")


def calls(*expressions: str, name: str = "calculate") -> Message:
    return Message("assistant", "", tool_calls=tuple(ToolCall(name, {"expression": each}) for each in expressions))


def test_an_episode_answers_calls_until_there_is_an_answer() -> None:
    """Breaks when a result is wrong, the end is not seen, or the final answer is not the reward's to judge."""
    made = Calculator(system="Use the tool.", **KNOBS)
    assert isinstance(made, Environment)
    episode = made.reset(QUESTION, GOOD.facts, seed=0)
    assert [message.role for message in episode.messages] == ["system", "user"] and len(episode.tools) == 1
    turn = episode.step(calls("23 * 46", "1/0", "1/8"))
    assert [message.content for message in turn.messages] == ["1058", "error: division by zero", "0.125"]
    assert all(message.role == "tool" for message in turn.messages) and not turn.done
    last = episode.step(Message("assistant", GOOD.answer))
    assert last.done and last.score is None and not last.messages
    whole = replace(GOOD, prompt=(*episode.messages, *turn.messages))
    assert score(made, whole).value == 1.0 and score(made, whole).parts["calls"] == 3.0


def test_an_episode_ends_when_the_turns_run_out() -> None:
    """Breaks when a model that calls for ever is never told to stop."""
    episode = Calculator(most_turns=3, **KNOBS).reset(QUESTION, GOOD.facts, seed=0)
    turns = [episode.step(calls("1 + 1")) for _ in range(3)]
    assert [turn.done for turn in turns] == [False, False, True]
    assert isinstance(turns[-1].score, Score) and turns[-1].score.value == 0.0


def test_episodes_are_alike_and_apart() -> None:
    made = Calculator(most_turns=2, **KNOBS)
    one, two = made.reset(QUESTION, GOOD.facts, seed=1), made.reset(QUESTION, GOOD.facts, seed=1)
    assert one.messages == two.messages
    one.step(calls("1"))
    assert one.step(calls("1")).done and not two.step(calls("1")).done


def test_another_reward_may_judge_and_its_columns_are_needed() -> None:
    made = Calculator(reward={"method": "exact_match"})  # type: ignore[arg-type]
    assert score(made, replace(GOOD, answer="1058")).value == 1.0 and score(made, GOOD).value == 0.0
    assert made.columns == ("answer",) and made.needs == frozenset()
    assert made.score([], Tools()) == []


@pytest.mark.parametrize(
    "expression",
    ["", "x", "1 +", "__import__('os')", "(1).real", "[1, 2]", "9 ** 9 ** 9", "2 ** 0.5", "10 ** 1000", "True + 1",
     "'a' * 9", "1e999", "(" * 300 + "1", "1 if 1 else 2", "9" * 600, "-" * 400 + "1", "1 // 0", "5 % 0", "0 ** -1"],
)  # fmt: skip
def test_what_is_no_sum_is_told_and_never_run(expression: str) -> None:
    """Breaks when an expression holds up or ends the run, or reaches anything but numbers."""
    episode = Calculator(**KNOBS).reset(QUESTION, GOOD.facts, seed=0)
    [told] = episode.step(calls(expression)).messages
    assert told.content.startswith("error: ") or expression.startswith("-")
    [unknown] = episode.step(calls("1", name="shell")).messages
    assert "shell is not known" in unknown.content


@given(st.integers(-999, 999), st.integers(-999, 999), st.sampled_from(["+", "-", "*"]))
def test_sums_are_those_of_arithmetic(one: int, two: int, sign: str) -> None:
    assert calculated(f"({one}) {sign} ({two})") == Fraction(eval(f"({one}) {sign} ({two})"))


def test_an_answer_as_it_is_sampled_reaches_the_tool() -> None:
    """Breaks when what a model writes as a call is heard as words, so that no tool is ever used in training."""
    episode = Calculator.model_validate(KNOBS).reset((Message("user", "What is 12 * 12?"),), {"answer": "144"}, seed=0)
    said = message_said('<tool_call>{"name": "calculate", "arguments": {"expression": "12 * 12"}}</tool_call>')
    turn = episode.step(said)
    assert not turn.done and [message.content for message in turn.messages] == ["144"]
    assert episode.step(message_said("It is 144.")).done


@pytest.mark.parametrize("knobs", [{}, {"most_turns": 3}])
def test_without_a_reward_it_is_told_how_one_is_named(knobs: dict[str, Any]) -> None:
    """Breaks when all that is said is that a key is missing."""
    with pytest.raises(RecipeError, match="what judges the final answer; .*{method: calculator, reward: numeric}"):
        choose("rewards", Reward, {"method": "calculator", **knobs})


def test_an_environment_inside_it_is_refused() -> None:
    """Breaks when an exchange is taken that nobody plays."""
    with pytest.raises(RecipeError, match="is calculator, an environment, and nobody would play it"):
        choose("rewards", Reward, {"method": "calculator", "reward": {"method": "calculator", "reward": "numeric"}})
