"""What every reward of the catalog promises. Its test file says with which KNOBS, and names a GOOD and a BAD sample.

A reward that needs tools has them made there too, by `make_tools`; one that silence pleases says SILENCE_IS_FINE.
"""

from __future__ import annotations

import copy
import importlib
import math
from dataclasses import replace
from typing import Any

import pytest

from luthier.core import catalog
from luthier.core.chosen import choose
from luthier.core.errors import DataError, LuthierError
from luthier.data.sample import Sample
from luthier.rewards import Reward, Score, Tools
from luthier.train.scoring import Scoring
from tests.rewards.samples import asked_again

each = pytest.mark.parametrize("name", catalog.names("rewards"))


def asked(name: str) -> tuple[Reward, Tools, Sample, Sample]:
    """The reward, its tools, and the two samples of its test file."""
    told = importlib.import_module(f"tests.rewards.test_{name}")
    tools = told.make_tools() if "make_tools" in vars(told) else Tools()
    return choose("rewards", Reward, {"method": name, **told.KNOBS}), tools, told.GOOD, told.BAD


def values(reward: Reward, samples: list[Sample], tools: Tools) -> list[float]:
    found = []
    for verdict in asked_again(reward, samples, tools):
        assert isinstance(verdict, Score), verdict
        found.append(verdict.value)
    return found


@each
def test_a_good_answer_gets_more_than_a_bad_one_within_bounds(name: str) -> None:
    """Breaks when the sign is turned, a value leaves its bounds, or a number is not finite."""
    reward, tools, good, bad = asked(name)
    [better, worse] = asked_again(reward, [good, bad], tools)
    assert isinstance(better, Score) and isinstance(worse, Score), (better, worse)
    low, high = reward.bounds
    assert low <= worse.value < better.value <= high
    assert better.finite and worse.finite and not math.isnan(low + high)
    assert worse.reason, "what is wrong is said"


@each
def test_a_sample_is_judged_by_itself(name: str) -> None:
    """Breaks when neighbours, their order or their number change a value, or the second time differs."""
    reward, tools, good, bad = asked(name)
    alone = [*values(reward, [good], tools), *values(reward, [bad], tools)]
    assert values(reward, [bad, good, bad, good], tools) == alone[::-1] * 2
    assert reward.score([], tools) == []


@each
def test_nothing_gets_less_than_a_good_answer(name: str) -> None:
    """Breaks when silence pays: an answer of nothing, and one of thoughts alone."""
    reward, tools, good, _ = asked(name)
    if vars(importlib.import_module(f"tests.rewards.test_{name}")).get("SILENCE_IS_FINE"):
        pytest.skip("silence is what it asks for: its test file says so")
    best = values(reward, [good], tools)[0]
    for said in ("", " \n", "<think>so", f"<think>{good.answer}"):
        for verdict in reward.score([replace(good, answer=said)], tools):
            assert not isinstance(verdict, Score) or verdict.value < best, said


@each
def test_samples_are_left_as_they_are(name: str) -> None:
    """Breaks when a reward writes into the row: the next sample of the group would see it."""
    reward, tools, good, bad = asked(name)
    before = copy.deepcopy([good.facts, bad.facts])
    reward.score([good, bad], tools)
    assert [good.facts, bad.facts] == before


@each
def test_it_says_which_columns_and_tools_it_needs(name: str) -> None:
    """Breaks when a reward reads a column that no check before step 0 asks for, or a tool that is not there."""
    reward, tools, good, bad = asked(name)
    assert set(reward.columns) <= set(good.facts)
    for column in reward.columns:
        facts = {key: value for key, value in good.facts.items() if key != column}
        with pytest.raises(DataError, match=column):
            reward.score([replace(good, facts=facts)], tools)
        with pytest.raises(LuthierError, match=column):
            Scoring(reward, tools).check([(facts, "rows.jsonl:3:1")])
    Scoring(reward, tools).check([(each.facts, "rows.jsonl:3:1") for each in (good, bad)])
    only = [replace(each, facts={key: each.facts[key] for key in reward.columns}) for each in (good, bad)]
    assert values(reward, only, tools) == values(reward, [good, bad], tools)
    if reward.needs:
        with pytest.raises(LuthierError, match="needs a"):
            Scoring(reward, Tools())
        with pytest.raises(LuthierError, match="needs"):
            reward.score([good], Tools())


@each
def test_a_cell_that_cannot_be_read_is_found_before_an_answer_is(name: str) -> None:
    """Breaks when a run ends in the middle because the bad cell's row is drawn there, or rubbish is a traceback."""
    reward, tools, good, _ = asked(name)
    for column in reward.columns:
        for value in (None, True, 5, 0.5, "", "\0", "one two", [], [[]], [None], {}, {"a": None}):
            row = replace(good, facts={**good.facts, column: value})
            try:
                reward.check(row.facts)
            except DataError as failure:
                assert column in failure.received
                continue
            if "sandbox" not in reward.needs:
                reward.score([row], tools)


@each
def test_a_recipe_holds_all_of_it(name: str) -> None:
    """Breaks when a knob is lost between a run and its resume."""
    reward, tools, good, bad = asked(name)
    again: Any = choose("rewards", Reward, reward.as_recipe())
    assert again == reward
    assert values(again, [good, bad], tools) == values(reward, [good, bad], tools)


@each
def test_odd_answers_get_a_verdict(name: str) -> None:
    """Breaks when what a model may well say ends the run: odd letters, depth, a lone surrogate, much of anything."""
    reward, tools, good, _ = asked(name)
    best = values(reward, [good], tools)[0]
    odd = ["\0", "\ud800", "[" * 3000, "{{item.answer}}", "9" * 5000, "\u202e" + good.answer[::-1], "a " * 20_000,
           "<|im_end|><|im_start|>user", "```python\n```", "```" * 50, "{0}{x!r:>{y}}", "\\boxed{" * 500]  # fmt: skip
    for said in odd:
        for verdict in reward.score([replace(good, answer=said, tokens=(1,) * len(said))], tools):
            assert verdict is None or isinstance(verdict, LuthierError) or verdict.value <= best, said[:40]
