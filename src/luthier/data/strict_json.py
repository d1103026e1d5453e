"""Strict JSON: what the standard library lets pass (NaN, duplicate keys, lone surrogates) is an error with an address.

Idea: the C decoder of the standard library does the work; its hooks notice what is not strict JSON. Only then a slow
walk over the tokens finds out where it stands. The same walk finds the address of any key of a row that parsed well,
so an error inside a row costs nothing until there is one.

Source: RFC 8259 (JSON), RFC 7493 (I-JSON: unique keys, no lone surrogates, UTF-8).
Use when: bytes or text come from a user. Columns count characters, except where the bytes are no text: then bytes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn

from luthier.core.errors import DataError

MAX_DEPTH = 200
"""Deeper nesting than any data set has; far below what the interpreter's stack allows."""
MAX_DIGITS = 300
"""Longer whole numbers do not fit a float, and turning them into text takes quadratic time."""
EXCERPT = 80

_SPACE = re.compile(r"[ \t\n\r]*")
_TOKEN = re.compile(r'[ \t\n\r]*("[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{},:]|[^\s\[\]{},:"]+)', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_WIDE_MARKS = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")
_EXPECTED = {
    "Expecting value": "a value: an object, a list, a string, a number, true, false or null",
    "Expecting property name": "a key in double quotes",
    "Expecting ',' delimiter": "a comma or the end of the list or object",
    "Expecting ':' delimiter": "a colon after the key",
    "Unterminated string": "a string with a closing double quote",
    "Invalid control character": r"\n, \t or \uXXXX for a control character inside a string",
    "Invalid \\escape": r"one of \" \\ \/ \b \f \n \r \t \uXXXX",
    "Invalid \\uXXXX escape": r"four hexadecimal digits after \u",
    "Illegal trailing comma": "a key or value after a comma",
}


class Place(NamedTuple):
    """A known place in a text: the file, line and column (from 1) of the character at `offset` (from 0)."""

    name: str
    line: int = 1
    column: int = 1
    offset: int = 0

    def at(self, text: str, offset: int) -> str:
        """The address `file:line:column` of the character at `offset`, which is not before this place."""
        place = self.moved(text, offset)
        return f"{place.name}:{place.line}:{place.column}"

    def moved(self, text: str, offset: int) -> Place:
        """The place of the character at `offset`, which is not before this place."""
        if offset == self.offset:
            return self
        breaks = text.count("\n", self.offset, offset)
        column = offset - text.rfind("\n", self.offset, offset) if breaks else self.column + offset - self.offset
        return Place(self.name, self.line + breaks, column, offset)


def excerpt(text: str, *, limit: int = EXCERPT) -> str:
    """The beginning of `text` in double quotes, at most `limit` characters, with nothing a terminal would obey."""
    room = limit - 2
    if text[: room + 1].isprintable():
        return f'"{text}"' if len(text) <= room else f'"{text[: room - 3]}..."'
    shown: list[str] = []
    for index, char in enumerate(text[: limit + 1]):
        piece = char if char.isprintable() else json.dumps(char)[1:-1]
        if len(piece) > room or (index == limit):
            while shown and room < 3:
                room += len(shown.pop())
            return '"' + "".join(shown) + '..."'
        shown.append(piece)
        room -= len(piece)
    return '"' + "".join(shown) + '"'


def decode_text(raw: bytes, place: Place) -> str:
    """UTF-8 bytes that begin at `place` as text, without the byte order mark a file may begin with.

    Raises DataError with the line and the byte for UTF-16, NUL and anything else that is not UTF-8 text.
    """
    if place.line == 1 and place.column == 1:
        if is_wide(raw):
            raise DataError(
                "the file is UTF-16 or UTF-32", allowed="UTF-8", do="save it as UTF-8", where=f"{place.name}:1:1"
            )
        raw = raw.removeprefix(b"\xef\xbb\xbf")
    nul = raw.find(b"\0")
    if nul >= 0:
        raise DataError("a NUL byte", allowed="UTF-8 text", where=_byte_address(raw, nul, place), do=_nul_advice(raw))
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as failure:
        raise DataError(
            f"byte 0x{raw[failure.start]:02x} is not UTF-8 here",
            allowed="UTF-8 text",
            do="save the file as UTF-8",
            where=_byte_address(raw, failure.start, place),
        ) from None


def is_wide(raw: bytes) -> bool:
    """Whether a file that begins with `raw` says it is UTF-16 or UTF-32."""
    return raw.startswith(_WIDE_MARKS)


def _byte_address(raw: bytes, offset: int, place: Place) -> str:
    breaks = raw.count(b"\n", 0, offset)
    column = offset - raw.rfind(b"\n", 0, offset) if breaks else place.column + offset
    return f"{place.name}:{place.line + breaks}:{column}"


def _nul_advice(raw: bytes) -> str:
    head = raw[:200]
    wide = head.count(0) * 3 > len(head)
    return "it looks like UTF-16: save it as UTF-8" if wide else "the file is damaged, or it is no text file"


class _UnstrictError(ValueError):
    """The decoder met something that is JSON to the standard library only."""


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise _UnstrictError
    return values


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise _UnstrictError
    return int(digits)


def _real(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise _UnstrictError
    return value


def _constant(_: str) -> NoReturn:
    raise _UnstrictError


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_whole, parse_float=_real, parse_constant=_constant)
_LENIENT = json.JSONDecoder(parse_int=len, parse_float=len)


def parse(text: str, place: Place) -> object:
    """The one value that `text` holds. Raises DataError with the address, what came and what is allowed."""
    value, end = parse_at(text, 0 if text.startswith("{") else skip_space(text, 0), place)
    if end != len(text) and (end := skip_space(text, end)) != len(text):
        raise DataError(
            f"{excerpt(text[end : end + EXCERPT + 1])} after the end of the value",
            allowed="one JSON value",
            do="save the file with Unix or Windows line ends" if "\r" in text[:end] else "",
            where=place.at(text, end),
        )
    return value


def parse_at(text: str, start: int, place: Place) -> tuple[object, int]:
    """The value that begins at `start`, and the offset behind it. `place` is where offset 0 stands."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as failure:
        raise _syntax_error(text, failure, place) from None
    except (_UnstrictError, RecursionError):
        raise _unstrict_error(text, start, place) from None
    if text.count("[", start, end) + text.count("{", start, end) > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise _unstrict_error(text, start, place)
    if text.find("\\u", start, end) >= 0 and _SURROGATE.search(text, start, end):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise _unstrict_error(text, start, place) from None
    return value, end


def skip_space(text: str, start: int) -> int:
    """The offset of the first character from `start` on that is not JSON white space."""
    found = _SPACE.match(text, start)
    return found.end() if found else start


def skip_value(text: str, start: int) -> int | None:
    """The offset behind the value at `start`, strict or not; None when it is no JSON at all."""
    try:
        return _LENIENT.raw_decode(text, start)[1]
    except (json.JSONDecodeError, RecursionError):
        return None


def locate(text: str, path: Sequence[str | int]) -> int:
    """The offset of the key, or the list element, at `path`; of its nearest ancestor when it is not there."""
    best, best_depth = skip_space(text, 0), 0
    for token in _walk(text, best):
        depth = len(token.keys)
        if best_depth < depth <= len(path) and token.keys == list(path[:depth]):
            best, best_depth = token.offset, depth
            if depth == len(path):
                break
    return best


def _depth(value: object) -> int:
    level, depth = [value], 0
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
    return depth


def _syntax_error(text: str, failure: json.JSONDecodeError, place: Place) -> DataError:
    allowed = next((words for start, words in _EXPECTED.items() if failure.msg.startswith(start)), failure.msg)
    position = failure.pos
    came = text[position : position + EXCERPT + 1].partition("\n")[0]
    if not text[position:].strip():
        return DataError("the JSON ends too early", allowed=allowed, where=place.at(text, position))
    do = ""
    if came.startswith("'"):
        do = "write strings in double quotes"
    elif came.startswith(("True", "False", "None")):
        do = "write true, false or null"
    elif came.startswith(("}", "]")) and text[:position].rstrip().endswith(","):
        do = "take out the comma before it"
    return DataError(
        f"broken JSON at {excerpt(came)}", allowed=f"expected {allowed}", do=do, where=place.at(text, position)
    )


def _unstrict_error(text: str, start: int, place: Place) -> DataError:
    for token in _walk(text, start):
        found = _problem(token)
        if found:
            return DataError(found[0], allowed=found[1], where=place.at(text, token.offset))
    return DataError("JSON that is not strict", allowed="JSON as RFC 8259 has it", where=place.at(text, start))


def _problem(token: _Token) -> tuple[str, str] | None:
    """What is wrong with a token, and what is allowed instead."""
    raw = token.raw
    if token.depth > MAX_DEPTH:
        return "values nested too deep", f"at most {MAX_DEPTH} levels"
    if token.repeated:
        return f"the key {excerpt(str(token.keys[-1]))} for the second time", "each key once in an object"
    if raw.startswith('"'):
        if _SURROGATE.search(raw) and _lone_surrogate(raw):
            return f"half of a surrogate pair in {excerpt(raw[1:-1], limit=60)}", "whole characters"
        return None
    if raw in ("NaN", "Infinity", "-Infinity"):
        return raw, "a finite number, or null"
    if raw[0] in "-0123456789":
        if raw.lstrip("-").isdecimal():
            if len(raw) > MAX_DIGITS:
                return f"a number of {len(raw)} digits", f"at most {MAX_DIGITS} digits"
        elif _overflows(raw):
            return f"the number {excerpt(raw, limit=40)}", "a number that a 64-bit float can hold"
    return None


def _lone_surrogate(raw: str) -> bool:
    try:
        json.loads(raw, strict=False).encode()
    except UnicodeEncodeError:
        return True
    except ValueError:
        return False
    return False


def _overflows(raw: str) -> bool:
    try:
        return math.isinf(float(raw))
    except ValueError:
        return False


@dataclass(slots=True)
class _Level:
    """An open object or list during a walk."""

    is_object: bool
    key: str | int | None
    seen: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Token:
    """A key or the beginning of a value. `keys` leads to it, and is empty beyond the depth that matters."""

    offset: int
    raw: str
    keys: list[str | int]
    depth: int
    repeated: bool = False


def _walk(text: str, start: int) -> Iterator[_Token]:
    """The keys and values of the JSON value at `start`, in order; ends quietly where the text stops being JSON."""
    levels: list[_Level] = []
    position = start
    while found := _TOKEN.match(text, position):
        position = found.end()
        raw, offset = found[1], found.start(1)
        top = levels[-1] if levels else None
        if raw in ("}", "]"):
            if levels:
                levels.pop()
        elif raw == ",":
            if top:
                top.key = None if top.is_object else int(top.key or 0) + 1
        elif raw != ":":
            repeated = False
            if top and top.is_object and top.key is None:
                top.key = _key(raw)
                repeated = top.key in top.seen
                top.seen.add(top.key)
            keys = [level.key for level in levels if level.key is not None] if len(levels) <= MAX_DEPTH else []
            yield _Token(offset, raw, keys, len(levels) + (raw in ("{", "[")), repeated)
            if raw in ("{", "["):
                levels.append(_Level(raw == "{", None if raw == "{" else 0))
        if not levels:
            return


def _key(raw: str) -> str:
    try:
        return str(json.loads(raw, strict=False))
    except ValueError:
        return raw
