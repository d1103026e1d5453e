"""Learned: what a reward model says, shifted, scaled and kept within bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from luthier.core.errors import RecipeError
from luthier.data.conversation import Message
from luthier.rewards import Tools
from luthier.rewards.learned import Learned
from tests.rewards.samples import QUESTION, failure, sample, score

KNOBS: dict[str, Any] = {"shift": 1.0, "scale": 2.0, "most": 3.0}
GOOD, BAD = sample("long enough"), sample("x")


class Counts:
    """A reward model that likes letters, up to eleven; "nan" breaks it."""

    def scores(self, conversations: Sequence[Sequence[Message]]) -> list[float]:
        self.seen = [tuple(each) for each in conversations]
        return [self._one(conversation[-1].content) for conversation in conversations]

    def _one(self, said: str) -> float:
        return math.nan if said == "nan" else float(min(len(said), 11)) if len(said) < 12 else 0.0


def make_tools() -> Tools:
    return Tools(reward_model=Counts())


def test_it_is_shifted_scaled_and_cut() -> None:
    for said, value in (("x", 0.0), ("xxxxx", 2.0), ("xxxxxxxx", 3.0), ("", -0.5)):
        found = score(Learned(**KNOBS), sample(said), make_tools())
        assert found.value == pytest.approx(value) and found.parts["raw"] == len(said)
    assert score(Learned(), sample("xxx"), make_tools()).value == 3.0


def test_an_answer_that_was_cut_off_costs() -> None:
    """Breaks when a cut answer is scored like a whole one although it shall not be."""
    cut = sample("xxx", ended="length")
    assert score(Learned(cut_off_cost=1.5), cut, make_tools()).value == 1.5
    assert score(Learned(), cut, make_tools()).value == 3.0


def test_the_model_sees_the_whole_conversation() -> None:
    model = Counts()
    Learned().score([sample("a"), replace(sample("b"), prompt="plain")], Tools(reward_model=model))
    assert model.seen == [(*QUESTION, Message("assistant", "a")), (Message("user", "plain"), Message("assistant", "b"))]
    for thoughts, said in ((False, "d"), (True, "<think>c</think>d")):
        Learned(thoughts=thoughts).score([sample("<think>c</think>d")], Tools(reward_model=model))
        assert model.seen == [(*QUESTION, Message("assistant", said))]


def test_what_is_not_finite_is_a_failure_and_a_model_is_needed() -> None:
    assert "nan" in str(failure(Learned(), sample("nan"), make_tools()))
    with pytest.raises(RecipeError, match="reward model"):
        Learned().score([GOOD], Tools())
