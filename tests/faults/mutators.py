"""Mutations of bytes: what a disk, a network, a careless editor or an attacker makes of a file.

`mutate` applies one to four of them. All are drawn from the dice they are given, so a seed shows a mutant again.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import Final

Mutation = Callable[[bytearray, random.Random], None]

TOKENS: Final[tuple[bytes, ...]] = (
    b"\0", b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"\\ud800", b"\\udc00\\ud83d", b"\xc0\xaf",
    b"\xf4\x90\x80\x80", b"\xf0\x9f\x98\x80", b"e\xcc\x81", b"\xc2\x85", b"\xe2\x80\xa8", b"\x0b", b"\x1a", b"\x7f",
    b'"', b"'", b'""', b"{", b"}", b"[", b"]", b",", b":", b",,", b"\\", b"\\u", b"\\x41", b"{}", b"[]", b'{"":0}',
    b"\n", b"\r", b"\r\n", b"\n\n", b"\t", b"//", b"/*", b"#", b"null", b"true", b"None", b"$ref", b"../",
    b"NaN", b"-Infinity", b"Infinity", b"1e999", b"-1e999", b"1e308", b"-0", b"00", b"1.", b".5", b"0x10", b"1_000",
    b"-1", b"4294967296", b"9223372036854775808", b"18446744073709551615", b'"a":1,"a":2,',
    b'"content":', b'"role":', b'"messages":', b'"__class__":',
)  # fmt: skip


def mutate(data: bytes, dice: random.Random, *, tokens: Sequence[bytes] = TOKENS) -> bytes:
    """`data` after one to four mutations."""
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 1, 2, 2, 3, 4))):
        if dice.random() < 0.3:
            _insert(changed, dice.choice(tokens), dice)
        else:
            dice.choice(_MUTATIONS)(changed, dice)
    return bytes(changed)


_SCALAR: Final = re.compile(rb'(?<=[:\[,])\s*("(?:[^"\\]|\\.)*"|-?[0-9][0-9.eE+-]*|null|true|false)')
_KEY: Final = re.compile(rb'"(?:[^"\\]|\\.)*"(?=\s*:)')
_ODD_SCALARS: Final = (
    b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b'"\\ud800"', b'"\\udc00\\ud83d"', b'"\\u0000"', b"null",
    b"-0.0", b"7" * 400, b"[]", b"{}", b"true", b'""', b"1.0", b"1e-999",
)  # fmt: skip


def mutate_scalar(data: bytes, dice: random.Random) -> bytes:
    """JSON with one value that only a strict parser refuses, or with a key for the second time."""
    pattern = dice.choice((_SCALAR, _SCALAR, _KEY))
    found = list(pattern.finditer(data))
    if not found:
        return data
    match = dice.choice(found)
    if pattern is _KEY:
        return data[: match.start()] + match[0] + b":" + dice.choice(_ODD_SCALARS) + b"," + data[match.start() :]
    return data[: match.start(1)] + dice.choice(_ODD_SCALARS) + data[match.end(1) :]


def _insert(data: bytearray, what: bytes, dice: random.Random) -> None:
    place = _place(data, dice)
    data[place:place] = what


def _flip(data: bytearray, dice: random.Random) -> None:
    if data:
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)


def _overwrite(data: bytearray, dice: random.Random) -> None:
    if data:
        place = dice.randrange(len(data))
        what = dice.randbytes(dice.choice((1, 1, 2, 4, 8)))
        data[place : place + len(what)] = what


def _cut_tail(data: bytearray, dice: random.Random) -> None:
    del data[_place(data, dice) :]


def _cut_head(data: bytearray, dice: random.Random) -> None:
    del data[: _place(data, dice)]


def _remove(data: bytearray, dice: random.Random) -> None:
    start, stop = _range(data, dice)
    del data[start:stop]


def _zero(data: bytearray, dice: random.Random) -> None:
    start, stop = _range(data, dice)
    data[start:stop] = bytes(stop - start)


def _double(data: bytearray, dice: random.Random) -> None:
    start, stop = _range(data, dice)
    data[stop:stop] = data[start:stop]


def _move(data: bytearray, dice: random.Random) -> None:
    start, stop = _range(data, dice)
    piece = data[start:stop]
    del data[start:stop]
    _insert(data, bytes(piece), dice)


def _repeat(data: bytearray, dice: random.Random) -> None:
    what = dice.choice((b"[", b"{", b'{"a":', b'"', b",", b"0", b"9", b" ", b"\n"))
    _insert(data, what * dice.choice((3, 30, 300)), dice)


def _many_digits(data: bytearray, dice: random.Random) -> None:
    _insert(data, dice.choice((b"-", b"", b"0.")) + b"7" * dice.choice((20, 310, 5000)), dice)


def _deep(data: bytearray, dice: random.Random) -> None:
    depth = dice.choice((50, 199, 201, 2000, 20_000)) if dice.random() < 0.2 else 150
    opening, closing = dice.choice(((b"[", b"]"), (b'{"a":', b"}")))
    _insert(data, opening * depth + b"1" + closing * dice.choice((depth, depth, depth - 1)), dice)


def _wide(data: bytearray, dice: random.Random) -> None:
    """The same text in another encoding."""
    if dice.random() < 0.2:
        text = bytes(data).decode("utf-8", "replace")
        data[:] = text.encode(dice.choice(("utf-16", "utf-16-le", "utf-32", "cp1252")), "replace")


def _swap(data: bytearray, dice: random.Random) -> None:
    if len(data) > 1:
        one, two = dice.randrange(len(data)), dice.randrange(len(data))
        data[one], data[two] = data[two], data[one]


_MUTATIONS: Final[tuple[Mutation, ...]] = (
    _flip, _flip, _flip, _overwrite, _overwrite, _cut_tail, _cut_head, _remove, _zero, _double, _move, _repeat,
    _many_digits, _deep, _wide, _swap,
)  # fmt: skip


def _place(data: bytearray, dice: random.Random) -> int:
    return dice.randrange(len(data) + 1)


def _range(data: bytearray, dice: random.Random) -> tuple[int, int]:
    start = _place(data, dice)
    return start, min(len(data), start + dice.choice((1, 2, 4, 16, 64, 256)))
