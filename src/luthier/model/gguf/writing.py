"""GGUF files, written: the header first, then one tensor after another, so that memory holds one at a time.

Idea: shapes and formats are known before any number is read, and with them every offset. The file grows beside its
place under a hidden name and gets its own when it is whole and durable: a disk that fills up leaves nothing behind.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final, final

from torch import Tensor

from luthier.core.errors import CorruptError
from luthier.maths.ggml import Format, pack
from luthier.model.gguf.reading import ARRAY, MAGIC, SCALARS, STRING, VERSION, padded
from luthier.store.disk import explained, require_space
from luthier.store.large_file import LargeFile

U32: Final = 4
I32: Final = 5
F32: Final = 6
BOOL: Final = 7
_ROWS: Final = 2**22
"""Numbers that are packed and written at once."""


@final
@dataclass(frozen=True, slots=True)
class Key:
    """A value of a header with its type; `inner` is that of the items of a list."""

    value: Any
    kind: int
    inner: int = STRING

    def packed(self) -> bytes:
        """Type and value as the file has them."""
        if self.kind != ARRAY:
            return struct.pack("<I", self.kind) + _scalar(self.value, self.kind)
        head = struct.pack("<IIQ", ARRAY, self.inner, len(self.value))
        if self.inner == STRING:
            return head + b"".join(_scalar(item, STRING) for item in self.value)
        return head + struct.pack(f"<{len(self.value)}{SCALARS[self.inner][1]}", *self.value)


def whole(value: int) -> Key:
    """A count, id or size."""
    return Key(value, U32)


def real(value: int | float) -> Key:
    """A number."""
    return Key(value, F32)


def text(value: str) -> Key:
    """A text."""
    return Key(value, STRING)


def flag(value: bool) -> Key:
    """Yes or no."""
    return Key(value, BOOL)


def texts(values: Sequence[str]) -> Key:
    """A list of texts."""
    return Key(values, ARRAY, STRING)


def numbers(values: Sequence[int | float], kind: int) -> Key:
    """A list of numbers of one type."""
    return Key(values, ARRAY, kind)


@final
@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor that will be written: its name there, its shape as torch writes it, and its format."""

    name: str
    shape: tuple[int, ...]
    kind: Format

    @property
    def bytes(self) -> int:
        return prod(self.shape) // self.kind.block * self.kind.bytes


def write_gguf(
    path: Path,
    keys: Mapping[str, Key],
    plan: Sequence[Planned],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    told: Callable[[int], None] = lambda _bytes: None,
) -> int:
    """Write a file; `tensors` come in the order of the plan, `told` hears the bytes of each. Its size.

    Raises DiskFullError or StorageError, NumericError for numbers that the format cannot hold, and CorruptError when
    what comes is not what was planned. Then there is no file, and one that was there before is unharmed.
    """
    head = _header(keys, plan)
    size = padded(len(head)) + sum(padded(each.bytes) for each in plan)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    require_space(path.parent, size)
    with explained("write", path, needed_bytes=size):
        done = False
        try:
            beside.unlink(missing_ok=True)
            with closing(LargeFile(beside, size)) as file:
                file.write(memoryview(head.ljust(padded(len(head)), b"\0")), 0)
                _write_tensors(file, padded(len(head)), plan, tensors, told)
                file.finish()
            beside.replace(path)
            done = True
        finally:
            if not done:
                beside.unlink(missing_ok=True)
    return size


def _header(keys: Mapping[str, Key], plan: Sequence[Planned]) -> bytes:
    pieces = [MAGIC, struct.pack("<IQQ", VERSION, len(plan), len(keys))]
    pieces += [_scalar(name, STRING) + key.packed() for name, key in keys.items()]
    offset = 0
    for each in plan:
        shape = each.shape[::-1]
        pieces.append(_scalar(each.name, STRING) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape))
        pieces.append(struct.pack("<IQ", each.kind.code, offset))
        offset += padded(each.bytes)
    return b"".join(pieces)


def _write_tensors(
    file: LargeFile, at: int, plan: Sequence[Planned], tensors: Iterable[tuple[str, Tensor]],
    told: Callable[[int], None],
) -> None:  # fmt: skip
    """From byte `at` on."""
    coming = iter(tensors)
    for each in plan:
        name, tensor = next(coming, ("the end", None))
        if tensor is None or name != each.name or tuple(tensor.shape) != each.shape:
            came = name if tensor is None else f"{name} of shape {tuple(tensor.shape)}"
            raise CorruptError(f"{came} came where {each.name} of shape {each.shape} was planned",
                               do="report it: the plan of the file and its tensors differ")  # fmt: skip
        flat = tensor.reshape(-1)
        for start in range(0, flat.numel(), _ROWS):
            packed = memoryview(pack(flat[start : start + _ROWS], each.kind))
            file.write(packed, at)
            at += packed.nbytes
        file.write(memoryview(bytes(padded(each.bytes) - each.bytes)), at)
        at += padded(each.bytes) - each.bytes
        told(each.bytes)


def _scalar(value: Any, kind: int) -> bytes:
    if kind == STRING:
        encoded = value.encode("utf-8")
        return struct.pack("<Q", len(encoded)) + encoded
    return struct.pack(SCALARS[kind], value)


