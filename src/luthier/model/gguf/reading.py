"""GGUF files, read: every length is compared with the size of the file before anything is taken for it.

Idea: a header of a few bytes can claim any number of tensors, tokens or dimensions. Each count is checked against the
bytes that are left, and each tensor against the end of the file and its neighbours: they lie one behind another, with
nothing between them but the padding. Whatever is wrong is one error with the file, the field and the reason. Tensors
are copies, one at a time.

Source: the GGUF format, version 3, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
Use when: a file that we wrote is compared with its model, or any GGUF file is looked at.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any, Final, Never, final

from torch import Tensor

from luthier.core.errors import CorruptError
from luthier.data.hub import open_regular
from luthier.data.strict_json import excerpt
from luthier.maths.ggml import BY_CODE, Format, unpack

MAGIC: Final = b"GGUF"
VERSION: Final = 3
ALIGNMENT: Final = 32
STRING: Final = 8
ARRAY: Final = 9
SCALARS: Final = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
"""How a value of each type is packed."""
_MOST_DIMENSIONS: Final = 4
_SMALLEST_KEY: Final = 8 + 4 + 1
_SMALLEST_TENSOR: Final = 8 + 4 + 4 + 8


@final
@dataclass(frozen=True, slots=True)
class Place:
    """One tensor of a file: its format, its shape as torch writes it, and where its bytes are."""

    kind: Format
    shape: tuple[int, ...]
    begin: int
    bytes: int


@final
@dataclass(frozen=True)
class GgufFile:
    """What a file says of itself, by key, and where its tensors are, by name, in the order of the file."""

    path: Path
    keys: dict[str, Any]
    places: dict[str, Place]

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """The header of a file. Raises CorruptError with field and reason, MissingError where there is none."""
        with open_regular(path) as (raw, size):
            cursor = _Cursor(path, BufferedReader(raw), size)
            keys, places = _header(cursor)
            cursor.file.detach()
        return cls(path, keys, places)

    def text(self, key: str) -> str:
        """The text at `key`. Raises CorruptError where there is another value."""
        value = self.keys.get(key)
        if not isinstance(value, str):
            _refuse(self.path, key, "no text", "a text")
        return value

    def tensor(self, name: str) -> Tensor:
        """The numbers of one tensor, in float32."""
        with open_regular(self.path) as (raw, size):
            return self._read(name, raw, size)

    def each(self) -> Iterator[tuple[str, Tensor]]:
        """Name and numbers of each tensor, one after another."""
        with open_regular(self.path) as (raw, size):
            for name in self.places:
                yield name, self._read(name, raw, size)

    def _read(self, name: str, raw: Any, size: int) -> Tensor:
        place = self.places[name]
        if place.begin + place.bytes > size:
            _refuse(self.path, name, "the file has become shorter", "the file as it was opened")
        raw.seek(place.begin)
        held = bytearray(place.bytes)
        view, done = memoryview(held), 0
        while done < len(view):
            more = raw.readinto(view[done:])
            if not more:
                _refuse(self.path, name, "the file ends inside it", "all its bytes")
            done += more
        return unpack(view, place.kind).reshape(place.shape)


@final
@dataclass
class _Cursor:
    """A place in the header, and how many bytes are left behind it."""

    path: Path
    file: BufferedReader
    size: int
    at: int = 0

    def take(self, count: int, field: str) -> bytes:
        if count > self.size - self.at:
            _refuse(self.path, field, f"{count:,} bytes at byte {self.at:,} of {self.size:,}", "what the file holds")
        made = self.file.read(count)
        if len(made) != count:
            _refuse(self.path, field, "the file ends inside it", "all its bytes")
        self.at += count
        return made

    def number(self, pattern: str, field: str) -> Any:
        return struct.unpack(pattern, self.take(struct.calcsize(pattern), field))[0]

    def count(self, field: str, smallest: int) -> int:
        """A number of things that take `smallest` bytes at least, as many as there is room for."""
        found = int(self.number("<Q", field))
        if found > (self.size - self.at) // smallest:
            _refuse(self.path, field, f"{found:,} in the {self.size - self.at:,} bytes that are left", "fewer")
        return found

    def text(self, field: str) -> str:
        length = self.count(field, 1)
        try:
            return self.take(length, field).decode("utf-8")
        except UnicodeDecodeError as failure:
            _refuse(self.path, field, f"no UTF-8: {failure.reason}", "UTF-8")


def _header(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, Place]]:
    path = cursor.path
    if cursor.size < 24 or cursor.take(4, "the magic") != MAGIC:
        _refuse(path, "the start", "other bytes", "GGUF and a version")
    version = cursor.number("<I", "the version")
    if version not in (2, VERSION):
        _refuse(path, "the version", str(version), "2 or 3, in little-endian bytes")
    tensors, values = cursor.count("the tensors", _SMALLEST_TENSOR), cursor.count("the keys", _SMALLEST_KEY)
    keys: dict[str, Any] = {}
    for _ in range(values):
        key = cursor.text("a key")
        if key in keys:
            _refuse(path, key, "two values", "one")
        keys[key] = _value(cursor, key, cursor.number("<I", key))
    entries = [_entry(cursor) for _ in range(tensors)]
    return keys, _placed(cursor, keys, entries)


def _value(cursor: _Cursor, key: str, kind: int) -> Any:
    if kind in SCALARS:
        return cursor.number(SCALARS[kind], key)
    if kind == STRING:
        return cursor.text(key)
    if kind != ARRAY:
        _refuse(cursor.path, key, f"a value of type {kind}", "0 to 12")
    inner = cursor.number("<I", key)
    if inner == STRING:
        return [cursor.text(key) for _ in range(cursor.count(key, 8))]
    if inner not in SCALARS:
        _refuse(cursor.path, key, f"a list of type {inner}", "numbers, flags or texts")
    width = struct.calcsize(SCALARS[inner])
    count = cursor.count(key, width)
    return list(struct.unpack(f"<{count}{SCALARS[inner][1]}", cursor.take(count * width, key)))


def _entry(cursor: _Cursor) -> tuple[str, Format, tuple[int, ...], int]:
    name = cursor.text("the name of a tensor")
    dimensions = cursor.number("<I", name)
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        _refuse(cursor.path, name, f"{dimensions} dimensions", f"1 to {_MOST_DIMENSIONS}")
    sizes = struct.unpack(f"<{dimensions}Q", cursor.take(8 * dimensions, name))
    code, offset = cursor.number("<I", name), cursor.number("<Q", name)
    kind = BY_CODE.get(code)
    if kind is None:
        _refuse(cursor.path, name, f"number format {code}", ", ".join(each.name for each in BY_CODE.values()))
    if not all(sizes) or sizes[0] % kind.block:
        _refuse(cursor.path, name, f"shape {sizes[::-1]}", f"rows of whole blocks of {kind.block}")
    return name, kind, tuple(reversed(sizes)), offset


def _placed(
    cursor: _Cursor, keys: dict[str, Any], entries: list[tuple[str, Format, tuple[int, ...], int]]
) -> dict[str, Place]:
    """Where the tensors are: one behind another, up to the end of the file."""
    path = cursor.path
    step = keys.get("general.alignment", ALIGNMENT)
    if type(step) is not int or not 8 <= step <= 2**20 or step & (step - 1):
        _refuse(path, "general.alignment", excerpt(str(step)), "a power of two from 8 on")
    start = padded(cursor.at, step)
    places: dict[str, Place] = {}
    end, room = 0, max(cursor.size - start, 0)
    for name, kind, shape, offset in entries:
        needed = prod(shape) // kind.block * kind.bytes
        if name in places:
            _refuse(path, name, "two tensors", "one")
        if offset != padded(end, step) or needed > room - offset:
            _refuse(path, name, f"{needed:,} bytes at {offset:,} of {room:,}", f"bytes from {padded(end, step):,} on")
        places[name] = Place(kind, shape, start + offset, needed)
        end = offset + needed
    if room > padded(end, step):
        _refuse(path, "the end of the tensors", f"byte {end:,} of {room:,}", "the end of the file")
    return places


def padded(at: int, step: int = ALIGNMENT) -> int:
    """The next multiple of `step`."""
    return -(-at // step) * step


def _refuse(path: Path, field: str, received: str, allowed: str) -> Never:
    raise CorruptError(
        f"no sound GGUF file: {excerpt(field)} has {received}",
        allowed=allowed,
        do="the file was cut short or damaged, or is of a kind that we do not write: export or fetch it again",
        where=str(path),
    )
