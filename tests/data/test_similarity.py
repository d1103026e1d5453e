"""Similarities of texts, against counting by hand and by brute force."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.similarity import SIMILARITIES, fuzzy_match, gleu, rouge, rouge_l

TEXTS = st.text("ab ", max_size=12)


@given(TEXTS, TEXTS)
def test_the_common_subsequence_is_that_of_the_recursion(one: str, two: str) -> None:
    """Breaks when the bits of the row are carried wrongly."""

    @cache
    def longest(at: int, to: int) -> int:
        if at == len(one) or to == len(two):
            return 0
        same = one[at] == two[to]
        return 1 + longest(at + 1, to + 1) if same else max(longest(at + 1, to), longest(at, to + 1))

    expected = 2 * longest(0, 0) / (len(one) + len(two)) if one or two else 1.0
    assert fuzzy_match(one, two) == pytest.approx(expected)


@given(TEXTS, TEXTS)
def test_each_is_symmetric_within_bounds_and_one_for_itself(one: str, two: str) -> None:
    for name, measure in SIMILARITIES.items():
        assert measure(one, two) == pytest.approx(measure(two, one)), name
        assert 0.0 <= measure(one, two) <= 1.0, name
        if len(one.split()) >= 5:
            assert measure(one, one) == 1.0, name


def test_they_are_what_is_counted_by_hand() -> None:
    one, two = "The cat sat on the mat", "the cat lay on a mat"
    assert rouge(one, two, size=1) == pytest.approx(2 * 4 / 12)  # the, cat, on, mat
    assert rouge(one, two, size=2) == pytest.approx(2 * 1 / 10)  # the cat
    assert rouge_l(one, two) == pytest.approx(2 * 4 / 12)
    assert gleu(one, two) == pytest.approx((4 + 1) / 18)  # 6 + 5 + 4 + 3 grams
    assert fuzzy_match("Pariz", "Paris") == pytest.approx(0.8)
    assert rouge_l("", "a") == rouge_l("", "") == gleu("!", "a") == 0.0
