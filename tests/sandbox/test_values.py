"""What crosses the border arrives as it was, built of builtin types; everything else is refused at either end."""

from __future__ import annotations

import json
import math
import time
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from enum import IntEnum
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.sandbox.guest.values import MOST_DEPTH, MOST_ITEMS, BorderError, pack, unpack

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(max_size=20)
    | st.complex_numbers(allow_nan=False)
)  # fmt: skip
KEYS = st.recursive(SCALARS, lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3), max_leaves=3)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.dictionaries(KEYS, inner, max_size=4)
    | st.sets(KEYS, max_size=4) | st.dictionaries(st.text() | st.just("!"), inner, max_size=3),
    max_leaves=12,
)  # fmt: skip


def same(left: Any, right: Any) -> bool:
    return type(left) is type(right) and repr(left) == repr(right) if isinstance(left, float) else left == right


@given(VALUES)
@settings(max_examples=300)
def test_plain_data_arrives_as_it_was(value: Any) -> None:
    try:
        text = pack(value)
    except BorderError as failure:
        assert "surrogate" in str(failure)
        return
    arrived = unpack(text)
    assert type(arrived) is type(value) and same(arrived, value)
    assert unpack(text.encode()) == value


@pytest.mark.parametrize("number", [0, -1, 2**62, -(2**62), 2**64, 10**4300 - 1, -(10**4300) + 1], ids=int.bit_length)
def test_whole_numbers_of_any_length_cross(number: int) -> None:
    assert unpack(pack(number)) == number


def test_numbers_that_json_does_not_have() -> None:
    assert math.isnan(unpack(pack(math.nan))) and unpack(pack([math.inf, -math.inf])) == [math.inf, -math.inf]
    assert str(unpack(pack(-0.0))) == "-0.0"


class Equal(int):
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = int.__hash__


class Liar(dict):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter(["forged"])

    def items(self) -> Any:
        return [("forged", 1)]

    def __class_getitem__(cls, _: object) -> Any:
        return cls


class Colour(IntEnum):
    RED = 1


@pytest.mark.parametrize(("sent", "arrived"), [
    (Equal(3), 3), (Liar(a=1), {"a": 1}), (Colour.RED, 1), (namedtuple("P", "x y")(1, 2), (1, 2)),
    (OrderedDict(a=1), {"a": 1}), (defaultdict(int, a=1), {"a": 1}), (Counter("aab"), {"a": 2, "b": 1}),
    (np.float32(0.5), 0.5), (np.int64(3), 3), (np.array([[1, 2]]), [[1, 2]]), (np.bool_(True), True),
    (bytearray(b"a"), bytearray(b"a")), (range(1, 9, 2), range(1, 9, 2)),
])  # fmt: skip
def test_a_subclass_arrives_as_what_it_is_underneath(sent: Any, arrived: Any) -> None:
    """Breaks when a class of a program, or what its methods say of it, comes through."""
    got = unpack(pack(sent))
    assert type(got) is type(arrived) and got == arrived and arrived == got


def test_iterators_arrive_as_what_they_bring() -> None:
    got = unpack(pack({"a": (n * n for n in range(4)), "b": {1: 2}.keys(), "c": map(str, [1])}))
    assert list(got["a"]) == [0, 1, 4, 9] and next(got["b"]) == 1 and list(got["c"]) == ["1"]
    with pytest.raises(BorderError, match="iterator of more"):
        pack(iter(range(MOST_ITEMS + 1)))


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("value", [
    10**4300, -(10**4300), object(), Fraction(1, 2), deque([1]), lambda: 1, type, ..., nested(MOST_DEPTH + 2), nested(5000), "\ud800", {1: {2}.add},
], ids=lambda value: type(value).__name__)  # fmt: skip
def test_what_is_no_plain_data_does_not_leave(value: Any) -> None:
    with pytest.raises(BorderError):
        pack(value)


@pytest.mark.parametrize("text", [
    "", "{", "nul", "NaN", "[Infinity]", "9" * 21, '"\\ud800"', '{"\\ud800": 1}', '{"!": "tuple"}', '{"!": "x", "of": []}',
    '{"!": ["tuple"], "of": []}', '{"!": "tuple", "of": [], "more": 1}', '{"!": "int", "of": "zz"}', '{"!": "int", "of": 3}',
    '{"!": "float", "of": "1e5"}', '{"!": "bytes", "of": "0"}', '{"!": "set", "of": [[]]}', '{"!": "set", "of": "ab"}',
    '{"!": "dict", "of": [[1]]}', '{"!": "dict", "of": [[[], 1]]}', '{"!": "dict", "of": [1]}', '{"!": "range", "of": [1, 2, 0]}',
    '{"!": "range", "of": [0, 1000000000000, 1]}', '{"!": "int", "of": "0x1' + "0" * 4000 + '"}',
    '{"!": "range", "of": [1]}', '{"!": "range", "of": [0.5, 1, 1]}', '{"!": "complex", "of": [1]}', '{"!": "complex", "of": ["a", 1]}',
    '{"!": null, "of": 1}', '{"!": "iterator", "of": 3}', "[" * 200_000, '{"a":' * 100_000, json.dumps(nested(MOST_DEPTH + 3)),
])  # fmt: skip
def test_a_text_that_nobody_packed_is_refused(text: str) -> None:
    """Breaks when what a program writes into the channel by itself raises anything else, or is taken."""
    with pytest.raises(BorderError):
        unpack(text)


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["tuple", "set", "int", "dict"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["!", "of", "a"]), inner, max_size=3),
    max_leaves=10,
))  # fmt: skip
@settings(max_examples=500)
def test_any_json_is_a_value_or_refused(tree: Any) -> None:
    """Breaks when a program finds words that make the host raise."""
    try:
        unpack(json.dumps(tree))
    except BorderError:
        return


def test_keys_that_fall_together_do_not_stop_the_host() -> None:
    """Breaks when a set of numbers with one hash costs the square of their number."""
    prime = (1 << 61) - 1
    items = [{"!": "int", "of": hex(prime * n)} for n in range(1, 40_000)]
    began = time.monotonic()
    for text in (json.dumps({"!": "set", "of": items}), json.dumps({"!": "dict", "of": [[item, 1] for item in items]})):
        with pytest.raises(BorderError, match="fall together"):
            unpack(text)
    assert time.monotonic() - began < 5
    assert len(unpack(pack(set(range(40_000))))) == 40_000
