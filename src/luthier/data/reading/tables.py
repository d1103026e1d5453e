"""Tables: CSV and TSV as rows of cells, each with the line and column where it begins.

Source: RFC 4180, and one liberty: a cell that does not begin with a quote may hold quotes.
Use when: a file has a header line and a delimiter; the delimiter is found in the header.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from luthier.core.errors import DataError
from luthier.data.reading.text_files import MAX_LINE_BYTES, lines, too_long
from luthier.data.strict_json import EXCERPT, excerpt

Cell = tuple[str, int, int]
"""The text of a cell, and the line and column where it begins."""


@dataclass(frozen=True, slots=True)
class TableRow:
    """A row by column: its address, its texts, and the address of each."""

    where: str
    values: Mapping[str, str]
    cells: Mapping[str, str]


def table_rows(path: Path, delimiter: str = "") -> Iterator[TableRow | DataError]:
    """The rows behind the header line. Raises DataError when there is no header that can be read."""
    header: list[str] = []
    following = lines(path)
    for line, text in following:
        if isinstance(text, DataError):
            if not header:
                raise text
            yield text
            continue
        if not text.strip("\r\n"):
            continue
        delimiter = delimiter or max(",;\t", key=text.count)
        try:
            cells = _row_cells(text, line, following, delimiter=delimiter, name=str(path))
            if header:
                yield _row(cells, header, str(path))
            else:
                header = _header(cells, str(path))
        except DataError as failure:
            if not header:
                raise
            yield failure


def _row_cells(
    text: str, line: int, following: Iterator[tuple[int, str | DataError]], *, delimiter: str, name: str
) -> list[Cell]:
    """The cells of the row that begins with `text`; takes more lines while a quote is open."""
    cells: list[Cell] = []
    at = size = 0
    first = line
    while True:
        begin = (line, at + 1)
        if text.startswith('"', at):
            value, text, line, at = _quoted(text, line, at, following=following, name=name)
            end = len(text.rstrip("\r\n"))
        else:
            end = len(text.rstrip("\r\n"))
            stop = text.find(delimiter, at, end)
            stop = end if stop < 0 else stop
            value, at = text[at:stop], stop
        cells.append((value, *begin))
        size += len(value)
        if at >= end:
            return cells
        if size > MAX_LINE_BYTES:
            raise too_long("a row", "one row", f"{name}:{first}:1", "look for a quote that is not closed")
        if not text.startswith(delimiter, at):
            raise DataError(
                f"{excerpt(text[at:end][: EXCERPT + 1])} after a closing quote",
                allowed=f"{delimiter!r} or the end of the line",
                do='write a quote inside a quoted cell as ""',
                where=f"{name}:{line}:{at + 1}",
            )
        at += 1


def _quoted(
    text: str, line: int, at: int, *, following: Iterator[tuple[int, str | DataError]], name: str
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
            more = next(following, None)
            if more is None:
                raise DataError(
                    "a quote that is never closed; all lines after it were read as its cell",
                    allowed="a closing quote",
                    where=opened,
                )
            if size > MAX_LINE_BYTES:
                raise too_long("a cell in quotes", "one value a cell", opened, "look for a quote that is not closed")
            line, taken = more
            if isinstance(taken, DataError):
                raise taken
            text, position = taken, 0


def _header(cells: Sequence[Cell], name: str) -> list[str]:
    header: list[str] = []
    for text, line, column in cells:
        if "\r" in text:
            raise DataError(
                f"a carriage return in the header: {excerpt(text[: EXCERPT + 1])}",
                allowed="lines that end in a line feed",
                do="save the file with Unix or Windows line ends",
                where=f"{name}:{line}:{column}",
            )
        if text.strip() in header:
            raise DataError(
                f"the column {excerpt(text)} for the second time",
                allowed="each column name once",
                where=f"{name}:{line}:{column}",
            )
        header.append(text.strip())
    return header


def _row(cells: Sequence[Cell], header: Sequence[str], name: str) -> TableRow:
    where = f"{name}:{cells[0][1]}:1"
    if len(cells) != len(header):
        raise DataError(
            f"a row of {len(cells)} cells",
            allowed=f"{len(header)} cells, one for each column of the header",
            do="put a cell that holds the delimiter in double quotes",
            where=where,
        )
    values = {column: cell[0] for column, cell in zip(header, cells, strict=True)}
    places = {column: f"{name}:{line}:{at}" for column, (_, line, at) in zip(header, cells, strict=True)}
    return TableRow(where, values, places)
