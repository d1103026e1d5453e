"""Format: what has the form, what only looks like it, and what would take for ever."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest

from luthier.core.errors import RecipeError
from luthier.rewards.format import AnswerFormat
from tests.rewards.samples import failure, sample, score

KNOBS: dict[str, Any] = {}
GOOD = sample("<think>well</think>\n<answer>7</answer>")
BAD = sample("<answer>7</answer>")


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        ("  <think>\na\n</think>\n\n<answer>b</answer>\n", 1.0),
        ("<think>a</think><answer>b", 0.0),
        ("<think>a</think>b", 0.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0.0),
        ("<think>a<think>b</think></think><answer>c</answer>", 0.0),
        ("<think>a<answer>b</answer></think>", 0.0),
        ("<think>a</think> so <answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer> done", 0.0),
        ("<think> </think><answer>b</answer>", 0.0),
        ("</think>a<think><answer>b</answer>", 0.0),
        ("<think>a</think><ans\u200bwer>b</answer>", 0.0),
        ("<think>a</think><\u0430nswer>b</\u0430nswer>", 0.0),
        ("<THINK>a</THINK><answer>b</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_tags_follow_each_other_each_once(answer: str, value: float) -> None:
    """Breaks when a tag may be left open, doubled, nested, empty, look-alike, or stand in any order."""
    found = score("format", sample(answer))
    assert found.value == value and bool(found.reason) == (value == 0.0)


def test_text_outside_and_a_tag_that_the_prompt_opens_are_knobs() -> None:
    """Breaks when a knob is not read."""
    assert score(AnswerFormat(outside=True), sample("So <think>a</think> and <answer>b</answer>.")).value == 1.0
    assert score(AnswerFormat(outside=True), sample("<answer>b</answer> <think>a</think>")).value == 0.0
    assert score(AnswerFormat(opened=True), sample("a</think><answer>b</answer>")).value == 1.0
    assert score("format", sample("a</think><answer>b</answer>")).value == 0.0


def test_parts_say_which_tag_is_right_and_partial_pays_for_it() -> None:
    """Breaks when one wrong tag hides that the other is right, or order is paid for."""
    one = sample("<think>a</think>b")
    assert score("format", one).parts == {"<think>": 1.0, "<answer>": 0.0}
    assert score(AnswerFormat(partial=True), one).value == 0.5
    assert score(AnswerFormat(partial=True), sample("<answer>b</answer><think>a</think>")).value == 0.0


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ('{"a": 1}', 1.0),
        (' {"a": [1, {}]} ', 1.0),
        ('<think>{</think>{"a": 1}', 1.0),
        ("[1]", 0.0),
        ("1", 0.0),
        ('{"a": 1,}', 0.0),
        ('{"a": 1, "a": 2}', 0.0),
        ('{"a": NaN}', 0.0),
        ('{"a": 1} {"a": 2}', 0.0),
        ('```json\n{"a": 1}\n```', 0.0),
        ('{"a": ' * 5000 + "1" + "}" * 5000, 0.0),
        ('<think>{"a": 1}', 0.0),
        ("", 0.0),
    ],
)
def test_a_json_object_is_read_strictly(answer: str, value: float) -> None:
    """Breaks when a key twice, NaN, a fence, a depth that ends Python, or an object in the thoughts counts."""
    assert score(AnswerFormat(json_object=True), sample(answer)).value == value


def test_a_pattern_matches_the_whole_answer() -> None:
    """Breaks when a match somewhere in the answer is enough, or a dot ends at the line."""
    form = AnswerFormat(pattern=r"Answer: \d+(\n.*)?")
    assert score(form, sample("Answer: 12\nas I said\nbefore")).value == 1.0
    assert score(form, sample("The Answer: 12")).value == 0.0


def test_an_answer_made_to_take_for_ever_is_left_out_in_time() -> None:
    """Breaks when the match has no limit, or its end is scored. (`re` takes minutes for these.)"""
    form = AnswerFormat(pattern=r"(a|aa)+(:.*)?", seconds=0.05)
    began = time.perf_counter()
    error = failure(form, sample("a" * 60 + "!"))
    assert time.perf_counter() - began < 5 and "0.05 s" in str(error) and not error.again
    assert score(form, sample("aaa: b")).value == 1.0


@pytest.mark.parametrize(
    ("knobs", "part"),
    [
        ({"tags": ()}, "is told []"),
        ({"json_object": True, "pattern": "a"}, "json_object"),
        ({"tags": ("a",), "pattern": "a"}, "pattern"),
        ({"tags": ("a b",)}, "no name of a tag"),
        ({"pattern": "("}, "no regular expression"),
    ],
)
def test_a_recipe_that_says_no_form_or_several_is_refused(knobs: dict[str, Any], part: str) -> None:
    with pytest.raises((RecipeError, ValueError), match=re.escape(part)):
        AnswerFormat(**knobs)


@pytest.mark.parametrize("knobs", [{}, {"pattern": "a+"}, {"json_object": True}, {"tags": ("plan",)}])
def test_what_was_written_down_is_read_again(knobs: dict[str, object]) -> None:
    """Breaks when a run cannot be resumed, since defaults that were written down count as another form."""
    method = AnswerFormat(**knobs)  # type: ignore[arg-type]
    assert AnswerFormat(**method.model_dump()) == method
