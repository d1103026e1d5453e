"""Data files as records with an address: JSON lists, JSONL, CSV, TSV, plain text and Parquet, plain or gzipped.

Idea: a reader yields one item for each row of the file, in order: a `Record`, or the `DataError` that stands in for
it. So a bad line is counted, and the lines after it are still read. All files are streamed: memory holds one row.
What the columns mean is not decided here but in `data/formats`.

Use when: a path from a recipe must become rows; `rows.read_rows` does that, with formats and counts.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from luthier.core.errors import DataError
from luthier.core.nearest import nearest
from luthier.core.optional import require
from luthier.data.reading.json_list import elements
from luthier.data.reading.tables import table_rows
from luthier.data.reading.text_files import (
    MAX_LINE_BYTES,
    PIECE_BYTES,
    first_line,
    is_regular,
    lines,
    pieces,
    too_long,
    unreadable,
)
from luthier.data.strict_json import EXCERPT, Place, excerpt, locate, parse, skip_space, skip_value

_SPECIAL: Final = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_NEAR: Final = 0.7
"""Share of the letters of a file's name, without suffixes, from which on it may have been meant."""
BATCH_BYTES = 16 * 2**20
"""How much of a Parquet file is decoded at once, about."""


class Record(NamedTuple):
    """A row as the file has it: its number from 0 (rejected rows count), its address, and its columns."""

    number: int
    where: str
    values: Mapping[str, object]
    source: str = ""
    place: Place = Place("")
    cells: Mapping[str, str] = MappingProxyType({})

    def locate(self, path: Sequence[str | int]) -> str:
        """The address of what stands at `path` in the row: its key in JSON, its cell in CSV, else the row."""
        if self.source:
            return self.place.at(self.source, locate(self.source, path))
        return self.cells.get(str(path[0]), self.where) if path else self.where


Item = Record | DataError


def read_records(path: Path, *, limit: int | None = None) -> Iterator[Item]:
    """The rows of one file, at most `limit`.

    Raises DataError when the file is missing or of no known kind, StorageError when it cannot be opened.
    """
    if not is_regular(path):
        raise missing_file(path)
    reader = READERS.get(suffix_of(path))
    if reader is None:
        raise DataError(
            f"{path.suffix or 'a file without a suffix'} is no kind of data file",
            allowed=" | ".join(READERS) + " (.gz may follow)",
            where=str(path),
        )
    return islice(reader(path), limit)


def missing_file(path: Path) -> DataError:
    """The error for a file that is not there, with the names in its folder that come close."""
    try:
        mode = path.stat().st_mode if path.exists() else 0
        if stat.S_ISDIR(mode):
            return DataError("is a folder", allowed="a file", where=str(path))
        if mode:
            return DataError(
                f"is {_SPECIAL.get(stat.S_IFMT(mode), 'no regular file')}",
                allowed="a regular file: data is read more than once",
                do="write the rows to a file first",
                where=str(path),
            )
        if not path.parent.is_dir():
            return DataError(f"there is no folder {path.parent}", allowed="a file that exists", where=str(path))
        names = sorted(item.name for item in path.parent.iterdir() if item.is_file())
    except (OSError, ValueError) as failure:
        raise unreadable(path, failure) from failure
    there = [name for name in names if suffix_of(Path(name)) in READERS]
    close = _near(path.name, there)
    do = f"did you mean {' or '.join(close)}?" if close else f"data files there: {', '.join(there[:5]) or 'none'}"
    return DataError("there is no such file", allowed="a file that exists", do=do, where=str(path))


def _near(name: str, there: Sequence[str]) -> list[str]:
    """The files that `name` may be a slip for. Suffixes say nothing of that: most files of a folder share one."""
    stems: dict[str, list[str]] = {}
    for file in there:
        stems.setdefault(_stem(file), []).append(file)
    close = nearest(_stem(name), stems, cutoff=_NEAR)
    return [file for stem in close for file in stems[stem]][:3]


def _stem(name: str) -> str:
    return Path(name.lower().removesuffix(".gz")).stem


def suffix_of(path: Path) -> str:
    """The suffix that decides how a file is read: `.jsonl` for `rows.JSONL.gz`."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def _object_record(value: object, number: int, place: Place, source: str) -> Item:
    where = f"{place.name}:{place.line}:{place.column}"
    if isinstance(value, dict):
        return Record(number, where, value, source, place)
    do = "give the file the name .json if it is one list of rows" if isinstance(value, list) else ""
    return DataError(
        f"the row is {_kind(value)}: {excerpt(source[: EXCERPT + 1])}",
        allowed="an object with named columns",
        do=do,
        where=where,
    )


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _read_jsonl(path: Path) -> Iterator[Item]:
    # A list spread over lines cannot be read line by line, whatever the file is called.
    return _walk_list(path) if first_line(path) in ("[", "[{") else _walk_lines(path)


def _read_json(path: Path) -> Iterator[Item]:
    first = first_line(path)
    start = skip_space(first, 0)
    # An object that does not end on its line is spread over lines; anything else is one object a line.
    spread = first.startswith("{", start) and skip_value(first, start) is None
    return _walk_list(path) if spread or first.startswith("[", start) else _walk_lines(path)


def _walk_lines(path: Path) -> Iterator[Item]:
    number, name = 0, str(path)
    for line, text in lines(path):
        if isinstance(text, DataError):
            yield text
        else:
            start = 0 if text.startswith("{") else skip_space(text, 0)
            if start == len(text):
                continue
            try:
                value = parse(text.rstrip("\r\n"), Place(name, line))
            except DataError as failure:
                yield failure
            else:
                yield _object_record(value, number, Place(name, line, start + 1), text[start:].rstrip())
        number += 1


def _walk_list(path: Path) -> Iterator[Item]:
    """The elements of a JSON list, or objects one after another, each with the line and column it begins at."""
    try:
        for number, element in enumerate(elements(pieces(path), str(path))):
            if isinstance(element, DataError):
                yield element
            else:
                yield _object_record(element.value, number, element.place, element.source)
    except DataError as failure:
        yield failure


def _read_table(path: Path, delimiter: str = "") -> Iterator[Item]:
    for number, row in enumerate(table_rows(path, delimiter)):
        yield row if isinstance(row, DataError) else Record(number, row.where, row.values, cells=row.cells)


def _read_text(path: Path) -> Iterator[Item]:
    """One document. Its length is bounded, since its tokens are made at once."""
    taken: list[str] = []
    size = 0
    try:
        for piece in pieces(path):
            taken.append(piece)
            size += len(piece)
            if size > MAX_LINE_BYTES:
                do = "cut it into several files, or make it a .jsonl file with a text in each row"
                raise too_long("a text", "one document a file", f"{path}:1:1", do)
    except DataError as failure:
        yield failure
        return
    if size:
        yield Record(0, f"{path}:1:1", {"text": "".join(taken)})


def _read_parquet(path: Path) -> Iterator[Item]:
    """Rows of a Parquet file; the line of an address is the number of the row, from 1."""
    parquet = require("pyarrow.parquet", extra="data", purpose="reading Parquet")
    arrow = require("pyarrow", extra="data", purpose="reading Parquet")
    number = 0
    try:
        # Without a buffer size whole column chunks are read ahead.
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=PIECE_BYTES) as table:
            for batch in table.iter_batches(batch_size=_batch_rows(table.metadata), use_threads=False):
                for values in batch.to_pylist():
                    yield Record(number, f"{path}:{number + 1}:1", values)
                    number += 1
    except (arrow.ArrowException, OSError, ValueError, ArithmeticError) as failure:
        yield DataError(
            f"not readable as Parquet ({str(failure)[:EXCERPT]}); nothing after this row was read",
            where=f"{path}:{number + 1}:1",
        )


def _batch_rows(about: Any) -> int:
    """How many rows of a Parquet file are about BATCH_BYTES, by what its row groups say of themselves."""
    groups = [about.row_group(index) for index in range(about.num_row_groups)]
    largest = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=1)
    return max(1, min(1024, BATCH_BYTES // max(largest, 1)))


READERS: Mapping[str, Callable[[Path], Iterator[Item]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_table,
    ".tsv": partial(_read_table, delimiter="\t"),
    ".txt": _read_text,
    ".text": _read_text,
    ".md": _read_text,
    ".parquet": _read_parquet,
}
"""Suffix -> reader."""
