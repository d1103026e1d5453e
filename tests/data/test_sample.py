"""What was said and what was only thought."""

from __future__ import annotations

import pytest

from luthier.core.errors import DataError
from luthier.data.sample import Sample


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("yes", "yes"),
        (" <think>no</think>\nyes ", "yes"),
        ("no</think>yes", "yes"),
        ("<think>a</think>b<think>c</think>d", "d"),
        ("<think>no", ""),
        ("<think>a</think>b<think>c", ""),
        ("yes <think>", ""),
        ("", ""),
    ],
)
def test_what_is_said_follows_the_last_thought(answer: str, said: str) -> None:
    """Breaks when a thought counts as an answer: one that is not ended, or one that the prompt has opened."""
    assert Sample(prompt="?", answer=answer).said == said


def test_a_column_that_is_not_there_is_told_with_those_that_are() -> None:
    sample = Sample(prompt="?", answer="", facts={"answer": 1, "tests": 2})
    assert sample.fact("tests") == 2
    with pytest.raises(DataError, match=r"'answers'; one of answer, tests"):
        sample.fact("answers")
