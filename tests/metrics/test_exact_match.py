"""Exact match: which final answers are one, and which are not."""

from __future__ import annotations

import pytest

from luthier.metrics.exact_match import ExactMatch

SOLUTION = "He sold 48/2 = <<48/2=24>>24 clips.\n48+24 = <<48+24=72>>72\n#### 72"


@pytest.mark.parametrize(
    ("answer", "reference", "equal"),
    [
        ("#### 72", SOLUTION, True),
        ("Some other way.\n####72", SOLUTION, True),
        ("#### $72.00", SOLUTION, True),
        ("#### 12\nNo, wait.\n#### 72\nSure.", SOLUTION, True),
        ("#### 72\n#### 12", SOLUTION, False),
        ("#### 7", SOLUTION, False),
        ("#### 720", SOLUTION, False),
        ("#### seventy-two", SOLUTION, False),
        ("The answer is 72", SOLUTION, False),
        ("72", SOLUTION, False),
        ("", SOLUTION, False),
        ("####", SOLUTION, False),
        ("#### 1000", "#### 1,000", True),
        ("#### 5%", "#### 5", True),
        ("#### -3", "#### 3", False),
        ("#### Paris", "#### Paris", True),
        ("#### paris", "#### Paris", False),
        ("#### NaN", "#### NaN", True),
        ("Table 2:  soup", "Table 2: soup", True),
        ("Table 2: soup, and #### more", "Table 2: soup", False),
        ("more #### 4", "4", False),
        ("4.0", "4", True),
    ],
)
def test_final_answers_are_compared(answer: str, reference: str, equal: bool) -> None:
    """Breaks when a number without the marker counts, digits are compared as text, or the first marker decides."""
    assert ExactMatch().of([answer], [[reference]]) == float(equal)


def test_it_is_a_share_and_any_reference_will_do() -> None:
    """Breaks when only the first reference counts, or hits are not divided by the answers."""
    assert ExactMatch().of(["a", "b", "c"], [["x", "a"], ["b"], ["y"]]) == pytest.approx(2 / 3)


def test_marker_and_capitals_are_knobs() -> None:
    """Breaks when a knob is not read."""
    assert ExactMatch(marker="Answer:").of(["x Answer: yes"], [["y Answer: yes"]]) == 1.0
    assert ExactMatch().of(["x Answer: yes"], [["y Answer: yes"]]) == 0.0
    assert ExactMatch(ignore_case=True).of(["#### PARIS"], [["#### Paris"]]) == 1.0
