"""Data files as records with an address: JSON lists, JSONL, CSV, TSV, plain text and Parquet, plain or gzipped.

Idea: a reader yields one item for each row of the file, in order: a `Record`, or the `DataError` that stands in for
it. So a bad line is counted, and the lines after it are still read. Files are streamed, except JSON lists and texts.
What the columns mean is not decided here but in `data/formats`.

Use when: a path from a recipe must become rows; `rows.read_rows` does that, with formats and counts.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from io import BufferedIOBase
from itertools import islice
from pathlib import Path

from luthier.core.errors import DataError, StorageError
from luthier.core.nearest import nearest
from luthier.core.optional import require
from luthier.data.strict_json import (
    EXCERPT,
    Place,
    decode_text,
    elements,
    excerpt,
    is_wide,
    locate,
    parse,
    skip_space,
    skip_value,
)

MAX_LINE_BYTES = 64 * 2**20
"""A longer line is a broken file, not a row: it is refused without being held in memory."""


@dataclass(frozen=True, slots=True)
class Record:
    """A row as the file has it: its number from 0 (rejected rows count), its address, and its columns."""

    number: int
    where: str
    values: Mapping[str, object]
    source: str = field(default="", repr=False)
    place: Place = field(default=Place(""), repr=False)
    cells: Mapping[str, str] = field(default_factory=dict, repr=False)

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
    if not path.is_file():
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
    if path.is_dir():
        return DataError("is a folder", allowed="a file", where=str(path))
    if not path.parent.is_dir():
        return DataError(f"there is no folder {path.parent}", allowed="a file that exists", where=str(path))
    names = sorted(item.name for item in path.parent.iterdir() if item.is_file())
    close = nearest(path.name, names)
    there = [name for name in names if suffix_of(Path(name)) in READERS][:5]
    do = f"did you mean {' or '.join(close)}?" if close else f"data files there: {', '.join(there) or 'none'}"
    return DataError("there is no such file", allowed="a file that exists", do=do, where=str(path))


def suffix_of(path: Path) -> str:
    """The suffix that decides how a file is read: `.jsonl` for `rows.JSONL.gz`."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def _open(path: Path) -> BufferedIOBase:
    try:
        return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")
    except OSError as failure:
        raise StorageError(f"cannot be opened: {failure.strerror}", where=str(path)) from failure


def _read_line(handle: BufferedIOBase, path: Path, line: int, *, limit: int) -> bytes:
    """One line, or its first `limit` bytes; an unreadable stream is a DataError or StorageError."""
    try:
        return handle.readline(limit)
    except (EOFError, zlib.error, gzip.BadGzipFile) as failure:
        raise DataError(
            f"the compressed file is damaged or cut short ({failure}); nothing after this line was read",
            do="fetch or compress it again",
            where=f"{path}:{line}:1",
        ) from None
    except OSError as failure:
        raise StorageError(f"cannot be read: {failure.strerror}", where=str(path)) from failure


def _lines(path: Path) -> Generator[tuple[int, str | DataError]]:
    """Line number and line with its end, or what is wrong with it; the last item may be why the file ends there."""
    with _open(path) as handle:
        number = 0
        while True:
            number += 1
            try:
                raw = _read_line(handle, path, number, limit=MAX_LINE_BYTES + 1)
                if number == 1 and is_wide(raw):
                    decode_text(raw, Place(str(path)))
                if len(raw) > MAX_LINE_BYTES:
                    while raw and not raw.endswith(b"\n"):
                        raw = _read_line(handle, path, number, limit=MAX_LINE_BYTES)
                    yield (
                        number,
                        DataError(
                            f"a line longer than {MAX_LINE_BYTES:,} bytes",
                            allowed="one row a line",
                            where=f"{path}:{number}:1",
                        ),
                    )
                    continue
            except DataError as failure:
                yield number, failure
                return
            if not raw:
                return
            try:
                text = decode_text(raw, Place(str(path), number))
            except DataError as failure:
                yield number, failure
                continue
            yield number, text


def _whole_text(path: Path) -> str:
    with _open(path) as handle:
        pieces = []
        while piece := _read_line(handle, path, 1, limit=MAX_LINE_BYTES):
            pieces.append(piece)
    return decode_text(b"".join(pieces), Place(str(path)))


def _object_record(value: object, number: int, place: Place, source: str) -> Item:
    where = place.at("", 0)
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
    return _walk_list(path) if _first_line(path).strip() in ("[", "[{") else _walk_lines(path)


def _read_json(path: Path) -> Iterator[Item]:
    first = _first_line(path)
    start = skip_space(first, 0)
    # An object that does not end on its line is spread over lines; anything else is one object a line.
    spread = first.startswith("{", start) and skip_value(first, start) is None
    return _walk_list(path) if spread or first.startswith("[", start) else _walk_lines(path)


def _first_line(path: Path) -> str:
    """The first line that is not blank; empty when it cannot be read, which the walk then tells."""
    with closing(_lines(path)) as lines:
        found = next((text for _, text in lines if isinstance(text, DataError) or text.strip()), "")
    return found if isinstance(found, str) else ""


def _walk_lines(path: Path) -> Iterator[Item]:
    number = 0
    for line, text in _lines(path):
        if isinstance(text, DataError):
            yield text
        else:
            start = skip_space(text, 0)
            if start == len(text):
                continue
            place = Place(str(path), line)
            try:
                value = parse(text.rstrip("\r\n"), place)
            except DataError as failure:
                yield failure
            else:
                yield _object_record(value, number, Place(str(path), line, start + 1), text[start:].rstrip())
        number += 1


def _walk_list(path: Path) -> Iterator[Item]:
    """The elements of a JSON list, or objects one after another, each with the line and column it begins at."""
    try:
        text = _whole_text(path)
        for number, element in enumerate(elements(text, Place(str(path)))):
            if isinstance(element, DataError):
                yield element
            else:
                yield _object_record(element.value, number, element.place, element.source)
    except DataError as failure:
        yield failure


_Cell = tuple[str, int, int]
"""The text of a cell, and the line and column where it begins."""


def _read_table(path: Path, delimiter: str = "") -> Iterator[Item]:
    """Rows of a table with a header line (RFC 4180; a cell that does not begin with a quote may hold quotes)."""
    header: list[str] = []
    number = 0
    lines = _lines(path)
    for line, text in lines:
        if isinstance(text, DataError):
            if not header:
                raise text
            yield text
            number += 1
            continue
        if not text.strip("\r\n"):
            continue
        delimiter = delimiter or max(",;\t", key=text.count)
        try:
            cells = _row_cells(text, line, lines, delimiter=delimiter, name=str(path))
            if not header:
                header = _header(cells, str(path))
                continue
            yield _table_record(cells, header, number, str(path))
        except DataError as failure:
            if not header:
                raise
            yield failure
        number += 1


def _row_cells(
    text: str, line: int, lines: Iterator[tuple[int, str | DataError]], *, delimiter: str, name: str
) -> list[_Cell]:
    """The cells of the row that begins with `text`; takes more lines while a quote is open."""
    cells: list[_Cell] = []
    at = 0
    while True:
        begin = (line, at + 1)
        if text.startswith('"', at):
            value, text, line, at = _quoted(text, line, at, lines=lines, name=name)
            end = len(text.rstrip("\r\n"))
        else:
            end = len(text.rstrip("\r\n"))
            stop = text.find(delimiter, at, end)
            stop = end if stop < 0 else stop
            value, at = text[at:stop], stop
        cells.append((value, *begin))
        if at >= end:
            return cells
        if not text.startswith(delimiter, at):
            raise DataError(
                f"{excerpt(text[at:end][: EXCERPT + 1])} after a closing quote",
                allowed=f"{delimiter!r} or the end of the line",
                do='write a quote inside a quoted cell as ""',
                where=f"{name}:{line}:{at + 1}",
            )
        at += 1


def _quoted(
    text: str, line: int, at: int, *, lines: Iterator[tuple[int, str | DataError]], name: str
) -> tuple[str, str, int, int]:
    """The quoted cell that opens at `at`: its text, the line it ends in, that line's number, the offset behind it."""
    opened = f"{name}:{line}:{at + 1}"
    pieces: list[str] = []
    position, size = at + 1, 0
    while True:
        close = text.find('"', position)
        if close >= 0 and not text.startswith('""', close):
            pieces.append(text[position:close])
            return "".join(pieces), text, line, close + 1
        stop = len(text) if close < 0 else close + 1
        pieces.append(text[position:stop])
        size += stop - position
        position = close + 2
        if close < 0:
            following = next(lines, None)
            if following is None or size > MAX_LINE_BYTES:
                raise DataError(
                    "a quote that is never closed; all lines after it were read as its cell",
                    allowed="a closing quote",
                    where=opened,
                )
            line, taken = following
            if isinstance(taken, DataError):
                raise taken
            text, position = taken, 0


def _header(cells: Sequence[_Cell], name: str) -> list[str]:
    header: list[str] = []
    for text, line, column in cells:
        if text.strip() in header:
            raise DataError(
                f"the column {excerpt(text)} for the second time",
                allowed="each column name once",
                where=f"{name}:{line}:{column}",
            )
        header.append(text.strip())
    return header


def _table_record(cells: Sequence[_Cell], header: Sequence[str], number: int, name: str) -> Item:
    where = f"{name}:{cells[0][1]}:1"
    if len(cells) != len(header):
        return DataError(
            f"a row of {len(cells)} cells",
            allowed=f"{len(header)} cells, one for each column of the header",
            do="put a cell that holds the delimiter in double quotes",
            where=where,
        )
    values = {column: cell[0] for column, cell in zip(header, cells, strict=True)}
    places = {column: f"{name}:{line}:{at}" for column, (_, line, at) in zip(header, cells, strict=True)}
    return Record(number, where, values, cells=places)


def _read_text(path: Path) -> Iterator[Item]:
    try:
        text = _whole_text(path)
    except DataError as failure:
        yield failure
        return
    if text:
        yield Record(0, f"{path}:1:1", {"text": text})


def _read_parquet(path: Path) -> Iterator[Item]:
    """Rows of a Parquet file; the line of an address is the number of the row, from 1."""
    parquet = require("pyarrow.parquet", extra="data", purpose="reading Parquet")
    arrow = require("pyarrow", extra="data", purpose="reading Parquet")
    number = 0
    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    yield Record(number, f"{path}:{number + 1}:1", values)
                    number += 1
    except (arrow.ArrowException, OSError, ValueError, ArithmeticError) as failure:
        yield DataError(
            f"not readable as Parquet ({str(failure)[:EXCERPT]}); nothing after this row was read",
            where=f"{path}:{number + 1}:1",
        )


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
