"""The tensors of a model folder as a stream: read by rows from one file or many, written with an index.

Idea: a model is larger than the memory that copies and merges it. A reader knows the place of every tensor from the
headers, and gives any rows of any of them; a writer knows every type and shape before the first byte, lays its files
out, and takes rows in any order from any thread. Rows are those of the last axis: a tensor of shape (a, b, c) has a * b
rows of c numbers, a vector has one. Bytes are copied, never mapped: a file that somebody cuts short is an error, not
the end of the process.
The digest of a file is taken of the bytes as they are handed over, so that reading it back later proves the disk.

Source: the safetensors format, and the index that transformers writes beside shards (`model.safetensors.index.json`).
Use when: a model's tensors are needed without the model. Write inside `store.folder.write_folder`, which gives a place
that appears whole or not at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Final, final

import numpy as np

from luthier.core.errors import CorruptError
from luthier.data.hub import ModelFiles, open_regular
from luthier.data.strict_json import excerpt
from luthier.kernels.floats import DType
from luthier.model.files.array_files import DTYPES, TensorPlace, read_places
from luthier.model.files.weight_files import INDEX, SINGLE, indexed_files
from luthier.store.disk import explained
from luthier.store.large_file import LargeFile
from luthier.store.manifest import Entry

SHARD_BYTES: Final = 5 * 10**9
"""Bytes of a file at most, unless one tensor has more: what transformers has long written."""
DTYPE_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
_ALIGN: Final = 8
_AGAIN: Final = "fetch the model again"


@final
@dataclass(frozen=True, slots=True)
class Slot:
    """Type and shape of a tensor, and its size as rows."""

    dtype: DType
    shape: tuple[int, ...]

    @property
    def columns(self) -> int:
        """Numbers of a row."""
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1]) if self.columns else 0

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@final
class Shards:
    """The tensors of a model folder or hub id, in the order of its files. Use it in a `with`; any thread may read."""

    def __init__(self, source: str | Path) -> None:
        self.source = str(source)
        self.slots: dict[str, Slot] = {}
        self._places: dict[str, tuple[Path, int, int]] = {}
        self._files = ExitStack()
        try:
            self._open(ModelFiles.of(source))
        except BaseException:
            self._files.close()
            raise

    def _open(self, files: ModelFiles) -> None:
        single = files.find(SINGLE)
        indexed = {} if single is not None else indexed_files(files)
        paths = [single] if single is not None else sorted({path for path, _ in indexed.values()})
        for path in paths:
            file, size = self._files.enter_context(open_regular(path))
            places = read_places(path, file, size)
            start = size - max((place.end for place in places.values()), default=0)
            for name, place in sorted(places.items(), key=lambda item: item[1].begin):
                if name in self.slots:
                    raise CorruptError(f"{excerpt(name)} stands in two files", where=str(path), do=_AGAIN)
                self.slots[name] = Slot(place.dtype, place.shape)
                self._places[name] = (path, file.fileno(), start + place.begin)
        for name, (path, shard) in indexed.items():
            if name not in self.slots or self._places[name][0] != path:
                raise CorruptError(f"{INDEX} says that {shard} holds {excerpt(name)}, and it does not",
                                   where=self.source, do=_AGAIN)  # fmt: skip
        extra = [name for name in self.slots if indexed and name not in indexed]
        if extra:
            raise CorruptError(
                f"{self._places[extra[0]][0].name} holds {excerpt(extra[0])}"
                + (f" and {len(extra) - 1} more tensors" if len(extra) > 1 else "")
                + f", which {INDEX} does not name",
                where=self.source,
                do=_AGAIN,
            )

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(slot.bytes for slot in self.slots.values())

    def read(self, name: str, first: int = 0, last: int | None = None, *, out: np.ndarray | None = None) -> np.ndarray:
        """Rows `first` to `last` of a tensor as a matrix; with neither, all of it in its own shape.

        `out` is a matrix of that type and size to read into. Raises CorruptError where the file ends before them.
        """
        slot, (path, number, begin) = self.slots[name], self._places[name]
        stop = slot.rows if last is None else last
        if not 0 <= first <= stop <= slot.rows:
            raise IndexError(f"rows {first} to {stop} of {slot.rows} of {name}")
        whole = first == 0 and last is None and out is None
        into = np.empty((stop - first, slot.columns), slot.dtype) if out is None else out
        view = into.reshape(-1, copy=False).view(np.uint8).data
        offset = begin + first * slot.columns * slot.dtype.itemsize
        while view:
            with explained("read", path):
                count = os.preadv(number, [view], offset)
            if not count:
                raise CorruptError(f"the file ends inside {excerpt(name)}", where=str(path), do=_AGAIN)
            view, offset = view[count:], offset + count
        return into.reshape(slot.shape) if whole else into

    def each(self) -> Iterator[tuple[str, np.ndarray]]:
        """Name and tensor, one after another."""
        for name in self.slots:
            yield name, self.read(name)

    def close(self) -> None:
        """Let go of the files."""
        self._files.close()

    def __enter__(self) -> Shards:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@final
class ShardWriter:
    """The weight files of a model, laid out before they are written. Any thread may write; use it in a `with`.

    `slots` says what will be written, in the order of the files. With one file it is `model.safetensors`, with more
    they have numbers and an index. After the `with`, `entries` holds size and digest of each file.
    """

    def __init__(
        self, folder: Path, slots: Mapping[str, Slot], *, shard_bytes: int = SHARD_BYTES, metadata: str = "pt"
    ) -> None:
        self.entries: dict[str, Entry] = {}
        self._folder, self._slots = folder, dict(slots)
        self._owner: dict[str, _File] = {}
        self._files: list[_File] = []
        groups = shards_of(slots, shard_bytes)
        for number, names in enumerate(groups, 1):
            name = SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            try:
                file = _File(folder / name, {key: self._slots[key] for key in names}, metadata)
            except BaseException:
                self._close()
                raise
            self._files.append(file)
            self._owner.update(dict.fromkeys(names, file))

    @property
    def order(self) -> Sequence[str]:
        """The names as their bytes lie: what is written in this order need not be read back for its digest."""
        return [name for file in self._files for name in file.order]

    def offset(self, name: str, first: int = 0) -> int:
        """The byte of its file where row `first` of a tensor begins."""
        slot = self._slots[name]
        return self._owner[name].offset(name) + first * slot.columns * slot.dtype.itemsize

    def write(self, name: str, tensor: np.ndarray, first: int = 0) -> None:
        """Put a tensor, or rows of it from row `first` on, into its file; they stay as they are until it is finished.

        Rows whose address has the remainder of their `offset` in a block of the disk (`store.large_file.BLOCK`) are
        not copied. Raises StorageError, DiskFullError.
        """
        slot = self._slots[name]
        if tensor.dtype != slot.dtype or tensor.size % max(slot.columns, 1):
            raise TypeError(f"{name} is laid out as {slot}, and {tensor.dtype} of {tensor.shape} came")
        data = _bytes_of(tensor)
        begin = first * slot.columns * slot.dtype.itemsize
        if begin + len(data) > slot.bytes:
            raise IndexError(f"row {first} and {len(data):,} bytes, {name} has {slot.bytes:,}")
        self._owner[name].write(name, data, begin)

    def settle(self) -> None:
        """Write the index and begin to make everything durable; the files can be read meanwhile."""
        if len(self._files) > 1:
            where = {name: self._owner[name].path.name for name in sorted(self._slots)}
            total = sum(slot.bytes for slot in self._slots.values())
            text = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n"
            with explained("write", self._folder / INDEX):
                (self._folder / INDEX).write_text(text, encoding="utf-8")
        for file in self._files:
            file.settle()

    def finish(self) -> None:
        """Wait until everything is durable. Raises ValueError where a tensor has not been written."""
        self.settle()
        for file in self._files:
            self.entries[file.path.name] = file.finish()

    def _close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self._close()


def shards_of(slots: Mapping[str, Slot], shard_bytes: int) -> list[list[str]]:
    """The names of each file: as many tensors, in their order, as fit into `shard_bytes`, and at least one."""
    groups: list[list[str]] = []
    held = 0
    for name, slot in slots.items():
        if not groups or (held + slot.bytes > shard_bytes and groups[-1]):
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += slot.bytes
    return groups or [[]]


def write_shards(
    folder: Path,
    slots: Mapping[str, Slot],
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Entry]:
    """Write whole tensors, one after another, as `slots` lays them out; size and digest of each file."""
    writer = ShardWriter(folder, slots, shard_bytes=shard_bytes)
    with writer:
        for name, tensor in tensors:
            writer.write(name, tensor)
    return writer.entries


def write_arrays(path: Path, tensors: Mapping[str, np.ndarray]) -> Entry:
    """Write one file of these tensors and make it durable; its size and digest.

    The file is the same in whatever order they come. Raises StorageError, DiskFullError.
    """
    slots = {name: Slot(tensors[name].dtype, tensors[name].shape) for name in sorted(tensors)}
    file = _File(path, slots, "pt")
    try:
        for name in file.order:
            file.write(name, _bytes_of(tensors[name]), 0)
        return file.finish()
    finally:
        file.close()


def _bytes_of(tensor: np.ndarray) -> memoryview:
    """The bytes of a tensor, as they lie in memory where it has no gaps."""
    return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data


@final
class _File:
    """One safetensors file: its header first, then the bytes of its tensors, wherever they belong."""

    def __init__(self, path: Path, slots: Mapping[str, Slot], metadata: str) -> None:
        self.path = path
        places = _laid_out(slots)
        header = _header(places, metadata)
        self._begins = {name: len(header) + place.begin for name, place in places.items()}
        self._missing = {name: slot.bytes for name, slot in slots.items()}
        self._lock = Lock()
        self._file = LargeFile(path, len(header) + max((place.end for place in places.values()), default=0))
        self._file.write(memoryview(header), 0)

    @property
    def order(self) -> Sequence[str]:
        return list(self._begins)

    def offset(self, name: str) -> int:
        return self._begins[name]

    def write(self, name: str, data: memoryview, begin: int) -> None:
        self._file.write(data, self._begins[name] + begin)
        with self._lock:
            self._missing[name] -= len(data)

    def settle(self) -> None:
        """Begin to make durable what has been written."""
        self._file.settle()

    def finish(self) -> Entry:
        """Make the file durable; its size and digest."""
        lacking = [name for name, count in self._missing.items() if count]
        if lacking:
            raise ValueError(f"{self.path.name}: {len(lacking)} tensors are not whole, {lacking[0]} among them")
        return self._file.finish()

    def close(self) -> None:
        self._file.close()


def _laid_out(slots: Mapping[str, Slot]) -> dict[str, TensorPlace]:
    """One behind the other, wide numbers first, so that each tensor begins where its numbers may."""
    places, begin = {}, 0
    for name, slot in sorted(slots.items(), key=lambda item: -item[1].dtype.itemsize):
        places[name] = TensorPlace(slot.dtype, slot.shape, begin, begin + slot.bytes)
        begin += slot.bytes
    return places


def _header(places: Mapping[str, TensorPlace], metadata: str) -> bytes:
    entries = {
        name: {"dtype": DTYPE_NAMES[place.dtype], "shape": list(place.shape), "data_offsets": [place.begin, place.end]}
        for name, place in places.items()
    }
    text = json.dumps({"__metadata__": {"format": metadata}, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGN)
    return len(text).to_bytes(8, "little") + text
