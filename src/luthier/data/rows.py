"""Rows: data files, through their format, as conversations and texts; every row counted, every bad one with an address.

Idea: a row is either kept or rejected, so read = kept + rejected, always. Rejecting is an error unless the recipe says
otherwise, and then it is a file. What makes a whole file unusable (missing, of unknown shape) is an error in any case.

Use when: a recipe names its data. `open_source` streams one file; `read_rows` reads all of them and counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

from luthier.core.errors import DataError, RecipeError, StorageError
from luthier.data.conversation import Row
from luthier.data.formats import SAMPLE, Detection, Format, detect, mapped, named
from luthier.data.formats._fields import FieldError
from luthier.data.readers import READERS, Item, Record, missing_file, read_records, suffix_of

OnBadRow = Literal["raise", "skip"]


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A data file of a recipe. Format and columns are detected unless given; `limit` keeps the first rows only."""

    path: Path | str
    format: str | None = None
    columns: Mapping[str, str] | None = None
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class FileReport:
    """What became of one file. Its rows are `rows[start : start + kept]` of the report."""

    source: SourceFile
    format: str
    why: str
    start: int
    read: int
    kept: int
    rejected: int


@dataclass(frozen=True, slots=True)
class RowReport:
    """The rows of all files, in order, and the count of every row that was read."""

    rows: tuple[Row, ...]
    rejects: tuple[DataError, ...]
    files: tuple[FileReport, ...]

    @property
    def read(self) -> int:
        return sum(file.read for file in self.files)

    @property
    def kept(self) -> int:
        return len(self.rows)

    @property
    def rejected(self) -> int:
        return len(self.rejects)


@dataclass(frozen=True, slots=True)
class OpenSource:
    """A file whose format is known: `items` yields a Row, or the error that stands for it, for each row of the file."""

    source: SourceFile
    format: str
    why: str
    items: Iterator[Row | DataError]


def find_sources(path: str | Path) -> list[SourceFile]:
    """The files that a path, a glob, a folder or `FILE#500` (its first 500 rows) stands for, in sorted order.

    Hidden files are only taken by name; READMEs and licences of a folder are not data.
    """
    text = str(path)
    if Path(text).is_file():
        return [SourceFile(Path(text))]
    stem, mark, count = text.rpartition("#")
    if mark and count.isdecimal() and count.isascii():
        if not Path(stem).is_file():
            raise missing_file(Path(stem))
        return [SourceFile(Path(stem), limit=int(count[:18]))]
    if Path(text).is_dir():
        found = sorted(item for item in Path(text).iterdir() if item.is_file() and _is_data(item))
        wanted = "a folder with data files: " + " | ".join(READERS)
    elif any(char in text for char in "*?["):
        found = _matches(Path(text))
        wanted = "a pattern that matches files"
    else:
        raise missing_file(Path(text))
    if not found:
        raise DataError("no data file is there", allowed=wanted, where=text)
    return [SourceFile(item) for item in found]


def _matches(pattern: Path) -> list[Path]:
    anchor = Path(pattern.anchor)
    try:
        found = anchor.glob(str(pattern.relative_to(anchor)))
        return sorted(item for item in found if item.is_file() and not item.name.startswith("."))
    except ValueError as failure:
        raise DataError(
            f"no pattern: {failure}", allowed="* ? [abc], and ** as a whole folder", where=str(pattern)
        ) from None


def _is_data(path: Path) -> bool:
    """Whether a file of a folder is data: of a known kind, not hidden, and not a paper that goes with the data."""
    papers = ("readme", "license", "licence", "changelog")
    return suffix_of(path) in READERS and not path.name.startswith(".") and path.stem.lower() not in papers


def open_source(source: SourceFile) -> OpenSource:
    """One file with its format detected from its first rows, ready to be streamed.

    Raises DataError when the file is missing, empty or of unknown shape, RecipeError for a format or mapping that
    cannot be.
    """
    if source.format is not None and source.columns is not None:
        raise RecipeError("data has both format and columns", allowed="one of the two", where=str(source.path))
    if source.limit is not None and source.limit < 1:
        raise RecipeError(f"a limit of {source.limit} rows", allowed="at least 1", where=str(source.path))
    given = mapped(source.columns) if source.columns is not None else None
    given = named(source.format) if source.format is not None else given
    items = read_records(Path(source.path), limit=source.limit)
    head: list[Item] = []
    samples: list[Mapping[str, object]] = []
    for item in items:
        head.append(item)
        if isinstance(item, Record):
            samples.append(item.values)
        if len(samples) == SAMPLE:
            break
    if not head:
        raise DataError("the file has no row", allowed="at least one row", where=str(source.path))
    whole = chain(head, items)
    if given is not None:
        return OpenSource(source, given.name, "named in the recipe", _meanings(given, whole))
    if not samples:
        return OpenSource(source, "unknown", "no row could be read", _errors(whole))
    found: Detection = detect(samples, where=str(source.path))
    return OpenSource(source, found.format.name, found.why, _meanings(found.format, whole))


def _errors(items: Iterable[Item]) -> Iterator[Row | DataError]:
    for item in items:
        if isinstance(item, DataError):
            yield item


def _meanings(format: Format, items: Iterable[Item]) -> Iterator[Row | DataError]:
    for item in items:
        if isinstance(item, DataError):
            yield item
            continue
        try:
            yield Row(item.number, item.where, format.read(item.values, item.where))
        except FieldError as failure:
            # Only now is it worth finding the column: a good row never pays for its address.
            where = item.locate(failure.path)
            yield DataError(failure.received, allowed=failure.allowed, do=failure.do, where=where)
        except DataError as failure:
            yield failure


def read_rows(sources: Sequence[SourceFile], *, on_bad_row: OnBadRow = "raise", max_errors: int = 20) -> RowReport:
    """The rows of all files.

    "raise" stops at `max_errors` bad rows and raises one DataError that lists them; "skip" keeps them as `rejects`.
    Either way, no usable row at all is an error.
    """
    rows: list[Row] = []
    rejects: list[DataError] = []
    files: list[FileReport] = []
    if not sources:
        raise RecipeError("no data file is named", allowed="at least one")
    for source in sources:
        opened = open_source(source)
        start, rejected_before, full = len(rows), len(rejects), False
        for item in opened.items:
            if isinstance(item, Row):
                rows.append(item)
                continue
            rejects.append(item)
            full = on_bad_row == "raise" and len(rejects) >= max_errors
            if full:
                break
        kept, rejected = len(rows) - start, len(rejects) - rejected_before
        files.append(FileReport(source, opened.format, opened.why, start, kept + rejected, kept, rejected))
        if full:
            break
    report = RowReport(tuple(rows), tuple(rejects), tuple(files))
    if rejects and (on_bad_row == "raise" or not rows):
        raise _bad_rows(report, on_bad_row=on_bad_row, max_errors=max_errors)
    return report


def _bad_rows(report: RowReport, *, on_bad_row: OnBadRow, max_errors: int) -> DataError:
    stopped = on_bad_row == "raise" and report.rejected >= max_errors
    lines = "".join(f"\n  {failure}" for failure in report.rejects[:max_errors])
    counts = f"{report.rejected:,} of {report.read:,} rows cannot be used ({report.kept:,} can)"
    if stopped:
        counts += f"; reading stopped after {max_errors} bad rows"
    do = "mend them; --set data.on_bad_row=skip leaves them out and writes them to a rejects file"
    if on_bad_row == "skip":
        do = "no row is left to train on"
    where = str(report.files[0].source.path) if len(report.files) == 1 else ""
    return DataError(counts + lines + "\n", do=do, where=where)


def write_rejects(path: Path, rejects: Iterable[DataError]) -> int:
    """Write one JSON object a rejected row (where, received, allowed, do) and return how many."""
    count = 0
    try:
        with path.open("w", encoding="utf-8") as handle:
            for failure in rejects:
                handle.write(json.dumps(failure.as_dict()) + "\n")
                count += 1
    except OSError as failure:
        raise StorageError(f"cannot be written: {failure.strerror}", where=str(path)) from failure
    return count
