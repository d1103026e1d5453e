"""Length: DAPO's equation 13, at its corners."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.core.errors import RecipeError
from luthier.rewards.length import Length
from tests.rewards.samples import failure, sample, score

SILENCE_IS_FINE = True
KNOBS: dict[str, Any] = {"most_tokens": 100, "buffer_tokens": 20}
GOOD = sample("short", tokens=5)
BAD = sample("long", tokens=90)


@pytest.mark.parametrize(
    ("tokens", "value"), [(0, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (101, -1.0), (200, -1.0)]
)
def test_the_cost_is_that_of_the_paper(tokens: int, value: float) -> None:
    assert score(Length(**KNOBS), sample("", tokens=tokens)).value == pytest.approx(value)


def test_the_paper_s_numbers_are_the_defaults() -> None:
    assert [score("length", sample("a", tokens=n)).value for n in (16_384, 18_432, 20_480)] == [0.0, -0.5, -1.0]


def test_an_answer_without_its_tokens_has_no_length() -> None:
    """Breaks when letters are counted as tokens, or nothing as short."""
    assert not failure("length", sample("a text", tokens=0)).again
    with pytest.raises((RecipeError, ValueError), match="buffer_tokens"):
        Length(most_tokens=10, buffer_tokens=11)
