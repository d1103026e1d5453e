"""Exact match as a reward: which answers are one of those the row knows."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.core.errors import DataError
from luthier.rewards.exact_match import ExactAnswer
from tests.rewards.samples import sample, score

KNOBS: dict[str, Any] = {}
GOOD = sample("Paris", answer=["Lutetia", "Paris"])
BAD = sample("Rome", answer="Paris")


@pytest.mark.parametrize(
    ("said", "known", "value"),
    [
        ("Paris", "Paris", 1.0),
        ("  Paris\n", "Paris", 1.0),
        ("<think>Rome? Paris!</think>Paris", "Paris", 1.0),
        ("<think>Paris", "Paris", 0.0),
        ("<think>Paris</think>", "Paris", 0.0),
        ("Cafe\u0301", "Caf\u00e9", 1.0),
        ("Pa\u200bris", "Paris", 0.0),
        ("P\u0430ris", "Paris", 0.0),
        ("Paris Rome London", "Paris", 0.0),
        ("paris", "Paris", 0.0),
        ("Paris.", "Paris", 0.0),
        ("7", 7, 1.0),
        ("", "Paris", 0.0),
    ],
)
def test_what_is_said_is_compared_and_not_what_is_thought(said: str, known: Any, value: float) -> None:
    """Breaks when thoughts count, an answer among several does, or invisible letters are passed over."""
    assert score("exact_match", sample(said, answer=known)).value == value


def test_the_last_line_behind_the_marker_counts() -> None:
    """Breaks when any of several final answers counts, or one without the marker."""
    form = ExactAnswer(marker="Answer:")
    assert score(form, sample("Answer: Rome\nAnswer: Paris\nBye.", answer="Paris")).value == 1.0
    assert score(form, sample("Answer: Paris\nAnswer: Rome", answer="Paris")).value == 0.0
    assert score(form, sample("Paris", answer="Paris")).value == 0.0


def test_an_answer_that_was_cut_off_is_none() -> None:
    """Breaks when the first letters of a longer answer count."""
    assert score("exact_match", sample("Pari", answer="Pari", ended="length")).value == 0.0


def test_capitals_and_marks_are_knobs() -> None:
    assert score(ExactAnswer(ignore_case=True), sample("PARIS", answer="Paris")).value == 1.0
    assert score(ExactAnswer(ignore_marks=True), sample('**"Paris".**', answer="Paris")).value == 1.0


@pytest.mark.parametrize("known", ["", [], ["a", ""], None, {"a": 1}])
def test_a_row_without_a_right_answer_is_the_fault_of_the_row(known: Any) -> None:
    """Breaks when such a row gives 0 for every answer, and nobody is told."""
    with pytest.raises(DataError, match="answer is"):
        score("exact_match", sample("a", answer=known))
