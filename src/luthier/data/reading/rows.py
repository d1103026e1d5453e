"""Rows: data files, through their format, as what they mean, one after another; each good or an error.

Idea: a file is opened twice, once to see from its first rows what its columns mean, once to read it; nothing is kept.
What makes a whole file unusable (missing, of unknown shape, changed while it was read) is an error in any case.

Use when: a recipe names its data. `find_sources` says which files that is; `open_source` streams one of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from luthier.core.errors import DataError, RecipeError, StorageError
from luthier.data.conversation import WORDS, Meaning, Row
from luthier.data.formats import SAMPLE, Detection, Format, detect, mapped, named, unwanted
from luthier.data.formats._fields import FieldError
from luthier.data.reading.readers import READERS, Item, Record, missing_file, read_records, suffix_of
from luthier.data.reading.text_files import MAX_LINE_BYTES, is_regular, unreadable

OnBadRow = Literal["raise", "skip"]
DETECTION_ITEMS = 10_000
"""Rows looked at, at most, for some that can be read: a file of damage only is not read twice."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A data file of a recipe. Format and columns are detected unless given; `limit` keeps the first rows only.

    `wanted` is what its rows may mean.
    """

    path: Path | str
    format: str | None = None
    columns: Mapping[str, str] | None = None
    limit: int | None = None
    wanted: tuple[Meaning, ...] = WORDS


@dataclass(frozen=True, slots=True)
class OpenSource:
    """A file whose format is known: `items` yields a Row, or the error that stands for it, for each row of the file."""

    source: SourceFile
    format: str
    why: str
    items: Iterator[Row | DataError]


@dataclass(frozen=True, slots=True)
class Stamp:
    """What tells that a file was written to: its place on the disk, its size and its time."""

    inode: int
    size: int
    changed_ns: int

    @classmethod
    def of(cls, path: Path | str) -> Stamp:
        """The stamp of a file as it is now. Raises StorageError when it cannot be had."""
        try:
            status = Path(path).stat()
        except (OSError, ValueError) as failure:
            raise unreadable(Path(path), failure) from failure
        return cls(status.st_ino, status.st_size, status.st_mtime_ns)

    def demand_same(self, path: Path | str) -> None:
        """Raise DataError when the file has changed since: rows of two versions must not be mixed."""
        now = Stamp.of(path)
        if now != self:
            raise DataError(
                f"the file changed while it was read ({self.size:,} bytes before, {now.size:,} now)",
                allowed="a file that nobody writes to",
                do="wait until it is complete, or read a copy of it",
                where=str(path),
            )


def find_sources(path: str | Path) -> list[SourceFile]:
    """The files that a path, a glob, a folder or `FILE#500` (its first 500 rows) stands for, in sorted order.

    Hidden files are only taken by name; READMEs and licences of a folder are not data.
    """
    text = str(path)
    if is_regular(Path(text)):
        return [SourceFile(Path(text))]
    stem, mark, count = text.rpartition("#")
    if mark and count.isdecimal() and count.isascii():
        if not is_regular(Path(stem)):
            raise missing_file(Path(stem))
        return [SourceFile(Path(stem), limit=int(count[:18]))]
    try:
        if Path(text).is_dir():
            found = sorted(item for item in Path(text).iterdir() if item.is_file() and _is_data(item))
            wanted = "a folder with data files: " + " | ".join(READERS)
        elif any(char in text for char in "*?["):
            found = _matches(Path(text))
            wanted = "a pattern that matches files"
        else:
            raise missing_file(Path(text))
    except StorageError:
        raise
    except OSError as failure:
        raise unreadable(Path(text), failure) from failure
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
    cannot be. `items` ends in a DataError when the file was written to meanwhile.
    """
    if source.format is not None and source.columns is not None:
        raise RecipeError("data has both format and columns", allowed="one of the two", where=str(source.path))
    if source.limit is not None and source.limit < 1:
        raise RecipeError(f"a limit of {source.limit} rows", allowed="at least 1", where=str(source.path))
    path = Path(source.path)
    given = mapped(source.columns) if source.columns is not None else None
    given = named(source.format) if source.format is not None else given
    if given is not None and given.meaning not in source.wanted:
        raise unwanted(given, source.wanted, where=str(path))
    if not is_regular(path):
        raise missing_file(path)
    stamp = Stamp.of(path)
    looked_at, samples = _head(path, source.limit)
    if not looked_at:
        raise DataError("the file has no row", allowed="at least one row", where=str(source.path))
    items = _same_file(read_records(path, limit=source.limit), path, stamp)
    if given is not None:
        return OpenSource(source, given.name, "named in the recipe", _meanings(given, items))
    if not samples and looked_at < DETECTION_ITEMS:
        return OpenSource(source, "unknown", "no row could be read", _errors(items))
    if not samples:
        raise DataError(
            f"none of the first {looked_at:,} rows can be read",
            do="look at the first ones with: luthier data check FILE#20",
            where=str(source.path),
        )
    found: Detection = detect(samples, wanted=source.wanted, where=str(source.path))
    return OpenSource(source, found.format.name, found.why, _meanings(found.format, items))


def _head(path: Path, limit: int | None) -> tuple[int, list[Mapping[str, object]]]:
    """How many rows were looked at, and the first that can be read: enough of them to tell their shape."""
    samples: list[Mapping[str, object]] = []
    looked_at = size = 0
    for item in read_records(path, limit=limit):
        looked_at += 1
        if isinstance(item, Record):
            samples.append(item.values)
            size += len(item.source) or sum(map(len, map(str, item.values.values())))
        if len(samples) == SAMPLE or size > MAX_LINE_BYTES or (not samples and looked_at == DETECTION_ITEMS):
            break
    return looked_at, samples


def _same_file(items: Iterator[Item], path: Path, stamp: Stamp) -> Iterator[Item]:
    yield from items
    stamp.demand_same(path)


def _errors(items: Iterator[Item]) -> Iterator[Row | DataError]:
    for item in items:
        if isinstance(item, DataError):
            yield item


def _meanings(format: Format, items: Iterator[Item]) -> Iterator[Row | DataError]:
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


def write_rejects(path: Path, rejects: Iterable[DataError]) -> int:
    """Write one JSON object a rejected row (where, received, allowed, do) and return how many."""
    count = 0
    try:
        with path.open("w", encoding="utf-8") as handle:
            for failure in rejects:
                handle.write(json.dumps(failure.as_dict()) + "\n")
                count += 1
    except StorageError:
        raise
    except OSError as failure:
        raise StorageError(f"cannot be written: {failure.strerror}", where=str(path)) from failure
    return count
