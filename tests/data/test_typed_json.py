"""Typed JSON: what is of the right kind comes back, what is not is told by its address."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.core.errors import RecipeError
from luthier.data import typed_json
from luthier.data.typed_json import Reader

NUMBERS = typed_json.named(typed_json.listed(typed_json.number))


@pytest.mark.parametrize(
    ("read", "value"),
    [
        (typed_json.text, ""), (typed_json.number, -(2**63)), (typed_json.number, 0.5), (typed_json.amount, 0),
        (typed_json.count, 0), (typed_json.count, 3.0), (typed_json.size, 1), (typed_json.flag, False),
        (typed_json.bounds, (-1, 0.5)), (typed_json.one_of(("a", "b")), "b"), (NUMBERS, {"a": [1, 2.5], "b": [0]}),
        (typed_json.listed(typed_json.text, least=0), []), (typed_json.anything, None),
    ],
)  # fmt: skip
def test_what_is_of_the_kind_comes_back(read: Reader[Any], value: Any) -> None:
    assert read(value, "x") == value


@pytest.mark.parametrize(
    ("read", "value", "where"),
    [
        (typed_json.text, 5, "x is 5"), (typed_json.filled_text, "\n", "x is"), (typed_json.flag, 1, "x is 1"),
        (typed_json.number, True, "x is True"), (typed_json.number, float("nan"), "x is nan"),
        (typed_json.number, float("inf"), "x is inf"), (typed_json.number, "1", "x is '1'"),
        (typed_json.positive, 0, "x is 0"), (typed_json.amount, -0.1, "x is -0.1"), (typed_json.count, 1.5, "x is 1.5"),
        (typed_json.count, float("nan"), "x is nan"), (typed_json.count, float("inf"), "x is inf"),
        (typed_json.size, 0, "x is 0"), (typed_json.bounds, [1, 1], "x is"), (typed_json.bounds, {0: 1, 1: 2}, "x is"),
        (typed_json.one_of(("a",)), ["a"], "x is"), (typed_json.one_of(("a",)), "b", "x is 'b'"),
        (NUMBERS, [1], "x is"), (NUMBERS, {"a": 1}, "x.a is 1"), (NUMBERS, {"a": []}, "x.a is"),
        (NUMBERS, {"a": [1, None]}, "x.a.1. is None"), (NUMBERS, {5: [1]}, "a key of x is 5"),
        (typed_json.text, ["long"] * 999, "x is"),
    ],
)  # fmt: skip
def test_what_is_not_is_told_by_its_address(read: Reader[Any], value: Any, where: str) -> None:
    """Breaks when true passes for 1, NaN for a number, a text for the list of its letters, or a key is not named."""
    with pytest.raises(RecipeError, match=where) as failure:
        read(value, "x")
    assert failure.value.allowed and len(failure.value.received) < 300
