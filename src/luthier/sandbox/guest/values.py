"""The values that may cross the border, as JSON: read by both ends, trusted by neither.

Idea: only plain data crosses, and what arrives is built anew from builtin types: a list, a number, a text. No class, no
method and no `__eq__` of the other end arrives with it. What JSON lacks is an object with one key, `!`, that names
the kind: tuples, sets, bytes, whole numbers of any length, dictionaries with any keys, iterators.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, Final

MOST_DEPTH: Final = 150
"""Values inside values."""
MOST_ITEMS: Final = 100_000
"""Values that an iterator is asked for; one that has more does not cross."""
MOST_WHOLE: Final = 10**4300
"""As far as Python itself writes whole numbers out: beyond it, showing one is an error that a program could choose."""
_LONG: Final = 1 << 62
_MOST_TOGETHER: Final = 500
"""Keys with the same hash; of honest ones there are hardly two."""
_KIND: Final = "!"


class BorderError(ValueError):
    """A value that does not cross, or a text that is no value."""


def pack(value: object) -> str:
    """A value as text. Raises BorderError for what is no plain data."""
    return json.dumps(_packed(value, 0), separators=(",", ":"), allow_nan=False)


def unpack(text: str | bytes) -> Any:
    """The value of a text, built of builtin types only. Raises BorderError for anything that `pack` would not write."""
    return unpack_parsed(parsed(text))


def parsed(text: str | bytes) -> Any:
    """Strict JSON, whoever wrote it."""
    try:
        return json.loads(text, parse_constant=_no_constant, parse_int=_whole)
    except (ValueError, RecursionError) as failure:
        raise BorderError(f"no value: {str(failure)[:200]}") from None


def unpack_parsed(tree: object) -> Any:
    """As `unpack`, of JSON that is parsed already."""
    return _unpacked(tree, 0)


def packable(value: object) -> Any:
    """A value as the tree that `pack` writes, to be put into a larger one."""
    return _packed(value, 0)


def _packed(value: Any, depth: int) -> Any:
    if value is None or value is True or value is False:
        return value
    if depth > MOST_DEPTH:
        raise BorderError(f"values are nested deeper than {MOST_DEPTH}")
    # The base classes are asked, not the object: what a subclass says of itself does not cross.
    if isinstance(value, str):
        return _text(str.__str__(value))
    if isinstance(value, int):
        whole = _bounded(int.__int__(value))
        return whole if -_LONG < whole < _LONG else {_KIND: "int", "of": hex(whole)}
    if isinstance(value, float):
        real = float.__float__(value)
        return real if math.isfinite(real) else {_KIND: "float", "of": repr(real)}
    if isinstance(value, list):
        return [_packed(item, depth + 1) for item in list.__iter__(value)]
    if isinstance(value, dict):
        return _packed_dictionary([(key, dict.__getitem__(value, key)) for key in dict.__iter__(value)], depth)
    for kind, (name, items) in _SEVERAL.items():
        if isinstance(value, kind):
            return {_KIND: name, "of": [_packed(item, depth + 1) for item in items(value)]}
    if isinstance(value, (bytes, bytearray)):
        return {_KIND: type(value).__mro__[-2].__name__, "of": bytes(value).hex()}
    if isinstance(value, complex):
        return {_KIND: "complex", "of": [_packed(value.real, depth + 1), _packed(value.imag, depth + 1)]}
    if isinstance(value, range):
        return {_KIND: "range", "of": [_packed(part, depth + 1) for part in (value.start, value.stop, value.step)]}
    return _packed_other(value, depth)


def _packed_dictionary(items: list[tuple[object, object]], depth: int) -> Any:
    if all(isinstance(key, str) for key, _ in items) and all(key != _KIND for key, _ in items):
        return {_text(str.__str__(key)): _packed(value, depth + 1) for key, value in items if isinstance(key, str)}
    return {_KIND: "dict", "of": [[_packed(key, depth + 1), _packed(value, depth + 1)] for key, value in items]}


def _packed_other(value: Any, depth: int) -> Any:
    """Arrays as lists of numbers, iterators as what they bring."""
    kind = type(value)
    if kind.__module__.partition(".")[0] in ("numpy", "torch") and callable(getattr(kind, "tolist", None)):
        return _packed(value.tolist(), depth)
    if isinstance(value, Iterator) or kind.__name__ in ("dict_keys", "dict_values", "dict_items"):
        items = list(islice(iter(value), MOST_ITEMS + 1))
        if len(items) > MOST_ITEMS:
            raise BorderError(f"an iterator of more than {MOST_ITEMS:,} values does not cross")
        return {_KIND: "iterator", "of": [_packed(item, depth + 1) for item in items]}
    raise BorderError(f"a value of the kind {kind.__name__[:80]} does not cross; plain data does")


def _unpacked(tree: Any, depth: int) -> Any:
    if depth > MOST_DEPTH + 1:
        raise BorderError(f"values are nested deeper than {MOST_DEPTH}")
    if tree is None or isinstance(tree, (bool, int, float)):
        return tree
    if isinstance(tree, str):
        return _text(tree)
    if isinstance(tree, list):
        return [_unpacked(item, depth + 1) for item in tree]
    if _KIND not in tree:
        return {_text(key): _unpacked(value, depth + 1) for key, value in tree.items()}
    build = _BUILT.get(tree[_KIND]) if isinstance(tree[_KIND], str) else None
    if build is None or set(tree) != {_KIND, "of"}:
        raise BorderError(f"no value of a kind that crosses: {str(tree.get(_KIND))[:80]}")
    held = tree["of"]
    try:
        return build([_unpacked(item, depth + 1) for item in held] if isinstance(held, list) else held)
    except (TypeError, ValueError, OverflowError) as failure:
        raise BorderError(f"no {tree[_KIND]}: {str(failure)[:200]}") from None


def _bounded(whole: int) -> int:
    if not -MOST_WHOLE < whole < MOST_WHOLE:
        raise BorderError("a whole number of more than 4,300 digits does not cross")
    return whole


def _range(parts: list[Any]) -> range:
    found = range(*parts)
    if len(found[: MOST_ITEMS + 1]) > MOST_ITEMS:
        raise BorderError(f"a range of more than {MOST_ITEMS:,} numbers does not cross")
    return found


def _text(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BorderError("a text with half a surrogate pair does not cross") from None
    return text


def _whole(digits: str) -> int:
    if len(digits) > 20:
        raise BorderError("a whole number of more than 20 digits has a form of its own")
    return int(digits)


def _no_constant(name: str) -> None:
    raise BorderError(f"{name} has a form of its own")


def _keyed(kind: Callable[[list[Any]], Any], key: Callable[[Any], Any] = lambda item: item) -> Callable[[Any], Any]:
    """Keys that were made to fall together would cost the square of their number."""

    def build(held: list[Any]) -> Any:
        if len(held) - len({hash(key(item)) for item in held}) > _MOST_TOGETHER:
            raise BorderError("its keys were made to fall together")
        return kind(held)

    return build


def _list_of(kind: Callable[[list[Any]], Any], size: int | None = None) -> Callable[[Any], Any]:
    def build(held: Any) -> Any:
        if not isinstance(held, list) or (size is not None and len(held) != size):
            raise BorderError("what it is made of has another shape")
        return kind(held)

    return build


def _text_of(kind: Callable[[str], Any]) -> Callable[[Any], Any]:
    def build(held: Any) -> Any:
        if not isinstance(held, str):
            raise BorderError("what it is made of has another shape")
        return kind(held)

    return build


def _infinite(text: str) -> float:
    if text not in ("nan", "inf", "-inf"):
        raise BorderError("such a number has a form of its own")
    return float(text)


_SEVERAL: Final[Mapping[type, tuple[str, Callable[[Any], Any]]]] = {
    tuple: ("tuple", tuple.__iter__),
    set: ("set", set.__iter__),
    frozenset: ("frozenset", frozenset.__iter__),
}
_BUILT: Final[Mapping[str, Callable[[Any], Any]]] = {
    "tuple": _list_of(tuple),
    "set": _list_of(_keyed(set)),
    "frozenset": _list_of(_keyed(frozenset)),
    "dict": _list_of(_keyed(dict, lambda pair: pair[0])),
    "iterator": _list_of(iter),
    "range": _list_of(_range, 3),
    "complex": _list_of(lambda parts: complex(*parts), 2),
    "int": _text_of(lambda text: _bounded(int(text, 16))),
    "float": _text_of(_infinite),
    "bytes": _text_of(bytes.fromhex),
    "bytearray": _text_of(bytearray.fromhex),
}
