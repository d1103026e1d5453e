"""Cases and sameness; what programs return meets them in tests/rewards/test_passes_tests.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.core.errors import DataError
from luthier.data.cases import Sameness, cases_of, same_text

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False, width=16) | st.text("ab", max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3),
    max_leaves=6,
)


class AlwaysEqual:
    """What a program would like to return."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


@given(PLAIN, PLAIN)
def test_only_what_is_the_same_in_kind_and_value_is_the_same(one: Any, two: Any) -> None:
    """Breaks when a comparison of Python (True == 1 == 1.0) gets through."""
    assert Sameness().same(one, one)
    assert Sameness(relative=0.0).same(one, two) == (_exact(one) == _exact(two))


def _exact(value: Any) -> Any:
    if isinstance(value, dict):
        return ("dict", sorted((key, _exact(each)) for key, each in value.items()).__repr__())
    return ("list", [_exact(each) for each in value]) if isinstance(value, list) else (type(value), value)


@pytest.mark.parametrize("known", [None, 1, "a", [1], {"a": 1}, {1}, 0.5, math.nan])
def test_an_object_that_is_equal_to_everything_is_nothing(known: Any) -> None:
    assert not Sameness(numbers=True).same(AlwaysEqual(), known)


def test_tolerance_holds_for_floats_and_never_for_what_is_not_finite() -> None:
    near = Sameness(absolute=0.1)
    assert near.same(1.05, 1.0) and not near.same(1.2, 1.0) and not near.same(2, 1)
    for said, known in ((math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0), (1.0, math.inf), (-math.inf, math.inf)):
        assert not Sameness(absolute=math.inf).same(said, known)
    assert near.same(math.nan, math.nan) and near.same(math.inf, math.inf)


def test_texts_are_compared_without_the_blanks_that_end_lines() -> None:
    assert same_text("5 \r\n6\n\n", "5\n6") and same_text("", "\n")
    for said in ("56", "5\n\n6", " 5\n6", "5\n6\n7"):
        assert not same_text(said, "5\n6"), said


def test_a_case_names_its_function_or_is_given_one() -> None:
    [called, given_one, script] = cases_of(
        [{"function": "f", "expected": 1}, {"arguments": [2], "expected": 2}, {"stdout": "3"}], "tests", "g"
    )
    assert called.call and called.call.function == "f" and given_one.call and given_one.call.function == "g"
    assert given_one.call.arguments == (2,) and script.call is None and script.stdout == "3"
    with pytest.raises(DataError, match=r"tests\[0\]"):
        cases_of([{"expected": 1}], "tests")
