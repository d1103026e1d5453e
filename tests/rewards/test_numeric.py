"""Numeric: which number is the final one, and when two are one."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.core.errors import DataError
from luthier.rewards.numeric import Numeric, number
from tests.rewards.samples import sample, score

KNOBS: dict[str, Any] = {}
GOOD = sample("48/2 = 24, so #### 72", answer="48+24 = 72\n#### 72")
BAD = sample("#### 7", answer="72")


@pytest.mark.parametrize(
    ("said", "known", "value"),
    [
        ("#### 72", "72", 1.0),
        ("It is $72.00.", "72", 1.0),
        ("so \\boxed{72}", "72", 1.0),
        ("so $\\boxed{\\frac{144}{2}}$", "72", 1.0),
        ("#### 7.2e1", "72", 1.0),
        ("#### 1,072", "1072", 1.0),
        ("#### 72 %", "72", 1.0),
        ("1/3", "0.333333", 0.0),
        ("#### 2/4", "0.5", 1.0),
        ("\u22125", "-5", 1.0),
        ("5 - 10 = -5", "-5", 1.0),
        ("#### 72\n#### 73", "72", 0.0),
        ("\\boxed{72} or \\boxed{73}", "72", 0.0),
        ("\\boxed{71, 72, 73}", "72", 0.0),
        ("#### 71 or 72", "72", 0.0),
        ("#### 71 72", "72", 0.0),
        ("#### 7,2", "72", 0.0),
        ("72 and then 73", "72", 0.0),
        ("#### seventy-two", "72", 0.0),
        ("#### nan", "72", 0.0),
        ("#### inf", "72", 0.0),
        ("#### 1e999", "72", 0.0),
        ("#### 1/0", "72", 0.0),
        ("<think>#### 72</think>I do not know", "72", 0.0),
        ("<think>#### 72", "72", 0.0),
        ("\\boxed{72", "73", 0.0),
        ("", "0", 0.0),
        ("1" + ",111" * 5000, "1", 0.0),
        ("#### 1" + ",111" * 5000, "1", 0.0),
        ("9" * 5000, "9", 0.0),
        ("#### 1/" + "9" * 5000, "9", 0.0),
    ],
)
def test_the_final_number_is_compared_as_a_number(said: str, known: str, value: float) -> None:
    """Breaks when one of several numbers counts, a number in the thoughts does, or digits are compared as text."""
    assert score("numeric", sample(said, answer=known)).value == value


def test_where_the_number_stands_is_a_knob() -> None:
    said = "\\boxed{1} 2 #### 3"
    for where, known in (("auto", 3), ("marker", 3), ("boxed", 1), ("last", 3)):
        assert score(Numeric(where=where), sample(said, answer=known)).value == 1.0
    assert score(Numeric(where="boxed"), sample("#### 3", answer=3)).parts == {"answered": 0.0}


def test_an_answer_that_was_cut_off_is_none() -> None:
    """Breaks when 7 counts where 72 was about to be said."""
    assert score("numeric", sample("#### 7", answer=7, ended="length")).value == 0.0


def test_tolerance_is_absolute_or_relative() -> None:
    for knobs, said, value in (({"absolute": 0.5}, "72.5", 1.0), ({"absolute": 0.5}, "72.6", 0.0),
                               ({"relative": 0.01}, "72.7", 1.0), ({"relative": 0.01}, "71.2", 0.0)):  # fmt: skip
        assert score(Numeric(**knobs), sample(said, answer="72")).value == value, (knobs, said)


@given(st.fractions(max_denominator=1000), st.booleans())
def test_a_number_is_read_as_it_is_written(value: Fraction, as_latex: bool) -> None:
    """Breaks when a sign, a numerator or a denominator is lost."""
    sign = "-" * (value < 0)
    latex = f"{sign}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"
    assert number(latex if as_latex else str(value)) == value


@given(st.integers(-(10**12), 10**12))
def test_commas_between_thousands_are_no_part_of_a_number(value: int) -> None:
    assert number(f"{value:,}") == value


@pytest.mark.parametrize("known", ["", "none", None, True, "1, 2", "nan"])
def test_a_row_without_a_number_is_the_fault_of_the_row(known: Any) -> None:
    with pytest.raises(DataError, match="answer is"):
        score("numeric", sample("1", answer=known))
