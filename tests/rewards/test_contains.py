"""Contains: which phrases are there, and that stuffing wins nothing."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.core.errors import DataError, RecipeError
from luthier.rewards.contains import Contains
from tests.rewards.samples import sample, score

KNOBS: dict[str, Any] = {"phrases": ("art",)}
GOOD = sample("The art of it.")
BAD = sample("Let us start.")


@pytest.mark.parametrize(
    ("said", "value"),
    [("Art!", 1.0), ("start", 0.0), ("<think>art</think>so", 0.0), ("a-r-t", 0.0), ("", 0.0), ("(art)", 1.0)],
)
def test_words_are_found_whole_in_what_is_said(said: str, value: float) -> None:
    """Breaks when a part of a word counts, or what is thought."""
    assert score(Contains(phrases=("art",)), sample(said)).value == value


def test_how_many_are_needed_is_a_knob() -> None:
    phrases = ("one", "two", "three")
    for need, values in (("all", (0.0, 0.0, 1.0)), ("any", (0.0, 1.0, 1.0)), ("share", (0.0, 1 / 3, 1.0))):
        form = Contains(phrases=phrases, need=need)
        found = tuple(score(form, sample(said)).value for said in ("no", "one", "three two one"))
        assert found == pytest.approx(values), need


def test_a_forbidden_phrase_or_too_many_words_take_everything() -> None:
    form = Contains(phrases=("one",), forbidden=("I cannot",), most_words=10)
    assert score(form, sample("one")).value == 1.0
    assert score(form, sample("one, and I\ncannot")).value == 0.0
    assert score(form, sample("one " * 11)).value == 0.0


def test_phrases_come_from_the_row_too() -> None:
    form = Contains(column="words", ignore_case=False)
    assert score(form, sample("a C++ tree", words=["C++", "tree"])).value == 1.0
    assert score(form, sample("a c++ tree", words=["C++", "tree"])).value == 0.0
    with pytest.raises(DataError, match="words is"):
        score(form, sample("a", words=[]))


def test_nothing_to_look_for_is_refused() -> None:
    for knobs in ({}, {"phrases": ("",)}):
        with pytest.raises((RecipeError, ValueError), match="phrase"):
            Contains(**knobs)
