"""The log of an intake: a few numbers for each row kept, a line in a file for each row refused, and the counts.

Idea: nothing of a row's content is kept. A row is found again by its address (file, line, column), and rows are
compared by digests of eight bytes. The log lies beside the tokens it belongs to, so that using them again needs no
reading, and knows every row that was left out.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from luthier.core.errors import DataError, StorageError, TemplateError
from luthier.data.conversation import Row
from luthier.data.findings import Answers, Watch, digests
from luthier.data.intake import FileReport, Intake, Kept, Read, Refused, size_of
from luthier.data.reading.rows import OnBadRow, SourceFile
from luthier.data.rendering.renderer import Renderer, TooLongError

MAX_ERRORS: Final = 20
"""Bad rows after which reading stops, where they are errors."""
KEPT_CHARACTERS: Final = 2**24
"""What is read is kept up to here until it is rendered; with the rows around it some 80 MB. More is read again."""
_KEPT_ROWS: Final = 2**16
_RECORD: Final = np.dtype(
    {
        "names": ["row", "file", "line", "column", "tokens", "text", "answer"],
        "formats": ["<i4", "<i4", "<i8", "<i8", "<u8", "<u8", "<u8"],
    }
)
_PACK: Final = struct.Struct("<iiqqQQQ")
_LOG, _ROWS, _REJECTS = "log.json", "log.npy", "rejects.jsonl"


@final
class Rejects:
    """The rows that were left out, as errors with an address; read from their file, one after another."""

    def __init__(self, path: Path, count: int, sources: Sequence[SourceFile]) -> None:
        self._path = path
        self._count = count
        self._sources = sources

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[DataError]:
        if not self._count:
            return
        try:
            with self._path.open(encoding="utf-8") as lines:
                for line in lines:
                    yield _restored(json.loads(line), self._sources)
        except OSError as failure:
            raise StorageError(f"cannot be read: {failure.strerror}", where=str(self._path)) from failure


@final
@dataclass(frozen=True)
class RowReport:
    """What became of every row that was read. `records` has one entry for each row that has views, in order."""

    files: tuple[FileReport, ...]
    rejects: Rejects
    records: NDArray[np.void]
    answers: Answers
    examples: Mapping[str, tuple[str, str]]

    @property
    def read(self) -> int:
        return sum(file.read for file in self.files)

    @property
    def kept(self) -> int:
        return sum(file.kept for file in self.files)

    @property
    def rejected(self) -> int:
        return sum(file.rejected for file in self.files)

    def where(self, row: int) -> str:
        """The address (`file:line:column`) of a row by its number; empty when there is no such row."""
        index = int(np.searchsorted(self.records["row"], row))
        if index == len(self.records) or int(self.records["row"][index]) != row:
            return ""
        return self.address(index)

    def address(self, index: int) -> str:
        """The address of the row of a record."""
        record = self.records[index]
        return f"{self.files[int(record['file'])].source.path}:{int(record['line'])}:{int(record['column'])}"

    @classmethod
    def open(cls, folder: Path, sources: Sequence[SourceFile]) -> RowReport | None:
        """The report that a log left in `folder`, or None when there is none that fits `sources`."""
        try:
            about = json.loads((folder / _LOG).read_text(encoding="utf-8"))
            records = np.load(folder / _ROWS, mmap_mode="r", allow_pickle=False)
            if records.dtype != _RECORD or len(about["files"]) != len(sources):
                return None
            files = tuple(FileReport(source, **file) for source, file in zip(sources, about["files"], strict=True))
            rejected = sum(file.rejected for file in files)
            examples = {text: (_full(place, sources), words) for text, (place, words) in about["examples"].items()}
            answers = Answers(**about["answers"])
            answers.first_empty = [_full(place, sources) for place in about["answers"]["first_empty"]]
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return None
        return cls(files, Rejects(folder / _REJECTS, rejected, sources), np.asarray(records), answers, examples)


@final
class RowLog:
    """Logs one intake; with a `folder`, in files there."""

    def __init__(self, intake: Intake, renderer: Renderer, *, folder: Path | None = None) -> None:
        self._intake = intake
        self._renderer = renderer
        self._folder = folder
        self._records = bytearray()
        self._watch = Watch(renderer)

    def __iter__(self) -> Iterator[Kept | Refused]:
        """Everything that comes from the intake, logged as it passes."""
        with (self._folder / _REJECTS if self._folder else Path(os.devnull)).open("w", encoding="utf-8") as rejects:
            for item in self._intake:
                if isinstance(item, Refused):
                    rejects.write(json.dumps(_stored(item, self._intake.sources)) + "\n")
                elif item.views:
                    _, line, column = item.row.where.rsplit(":", 2)
                    known = item.noted
                    marks = digests(item.views, self._renderer.native_rows) if known is None else known.marks
                    self._records += _PACK.pack(item.row.number, item.file, int(line), int(column), *marks)
                    self._watch.see(item.row.where, item.views, known)
                yield item

    def sound(self, on_bad_row: OnBadRow) -> Iterator[Kept]:
        """The rows that are kept. Raises DataError with the addresses of those that cannot be, unless they are skipped.

        A row that is too long is never skipped: what becomes of those is `over_length`'s to say.
        """
        bad: list[Refused] = []
        first = ""
        for item in self:
            if isinstance(item, Kept):
                yield item
                continue
            first = first or str(item.errors[0])
            if on_bad_row == "raise" or isinstance(item.errors[0], TooLongError):
                bad.append(item)
            if len(bad) == MAX_ERRORS:
                break
        if bad:
            raise bad_rows(self._intake, bad)
        if not self._intake.kept:
            raise DataError(
                f"none of the {self._intake.read:,} rows can be used\n  {first}\n",
                do="no row is left to train on",
                where=_only(self._intake.sources),
            )

    def report(self) -> RowReport:
        """What was logged."""
        rejected = self._intake.read - self._intake.kept if self._folder else 0
        return RowReport(
            tuple(self._intake.files),
            Rejects((self._folder or Path()) / _REJECTS, rejected, self._intake.sources),
            np.frombuffer(self._records, _RECORD),
            self._watch.answers,
            self._renderer.counts.examples,
        )

    def write(self, folder: Path) -> None:
        """Leave the log in the folder."""
        sources = self._intake.sources
        answers = self._watch.answers
        with (folder / _ROWS).open("wb") as file:
            # Not np.save, which says of a full disk only that less was written than was asked.
            shape = (len(self._records) // _RECORD.itemsize,)
            about_rows = {"descr": np.lib.format.dtype_to_descr(_RECORD), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, about_rows)
            file.write(self._records)
        examples = self._renderer.counts.examples
        about = {
            "files": [
                {"format": file.format, "why": file.why, "start": file.start, "read": file.read, "kept": file.kept}
                for file in self._intake.files
            ],
            "answers": {**answers.as_dict(), "first_empty": [_place(at, sources) for at in answers.first_empty]},
            "examples": {text: [_place(at, sources), words] for text, (at, words) in examples.items()},
        }
        (folder / _LOG).write_text(json.dumps(about), encoding="utf-8")


@final
class Problems:
    """What is wrong with rows, in at most `most` lines. A template says the same of many rows: that is one line."""

    def __init__(self, *, most: int) -> None:
        self.count = 0
        self._most = most
        self._first: dict[str, DataError] = {}
        self._alike: dict[str, int] = {}

    def add(self, refused: Refused) -> None:
        """Count the errors of a row."""
        for error in refused.errors:
            self.count += 1
            key = error.received if refused.rendering else str(error)
            if key in self._first or len(self._first) < self._most:
                self._first.setdefault(key, error)
                self._alike[key] = self._alike.get(key, 0) + 1

    def lines(self) -> list[str]:
        """Each problem with the first address and the number of the other rows that have it."""
        more = {key: f" (and {count - 1:,} rows alike)" * (count > 1) for key, count in self._alike.items()}
        return [f"{error}{more[key]}" for key, error in self._first.items()]


def demand_readable(sources: Sequence[SourceFile], *, keep: int = 0) -> Read | None:
    """Read all rows and render none. Returns them where they have up to `keep` characters, so that they are read once.

    Raises one DataError that lists those that cannot be read.
    """
    intake = Intake(sources, None)
    bad: list[Refused] = []
    rows: list[tuple[int, Row]] = []
    size = 0
    for file, item in intake.items():
        if isinstance(item, DataError):
            bad.append(Refused(file, (item,), rendering=False))
        elif size < keep and len(rows) < _KEPT_ROWS:
            rows.append((file, item))
            size += size_of(item)
        else:
            rows, keep = [], 0
        if len(bad) == MAX_ERRORS:
            break
    if bad:
        raise bad_rows(intake, bad)
    return Read(intake.files, rows) if keep else None


def bad_rows(intake: Intake, bad: Sequence[Refused]) -> DataError:
    """One error for rows that cannot be used: the counts, and each row with its address."""
    errors = [error for item in bad for error in item.errors]
    problems = Problems(most=len(errors))
    for item in bad:
        problems.add(item)
    counts = f"{len(bad):,} of {intake.read:,} rows cannot be used ({intake.kept:,} can)"
    if len(bad) == MAX_ERRORS:
        counts += f"; reading stopped after {MAX_ERRORS} bad rows"
    do = "mend them; --set data.on_bad_row=skip leaves them out and writes them to a rejects file"
    if all(isinstance(error, TooLongError) for error in errors):
        do = "data.max_tokens and data.over_length say what becomes of long rows"
    kind = TemplateError if all(isinstance(error, TemplateError) for error in errors) else DataError
    return kind(counts + "".join(f"\n  {line}" for line in problems.lines()), do=do, where=_only(intake.sources))


def _only(sources: Sequence[SourceFile]) -> str:
    """The file, where there is only one."""
    return str(sources[0].path) if len(sources) == 1 else ""


# An address is written down without the path: the same content may lie elsewhere when the log is used again.


def _stored(item: Refused, sources: Sequence[SourceFile]) -> dict[str, Any]:
    first = item.errors[0]
    return {
        "file": item.file,
        "code": first.code,
        "where": _place(first.where, sources, item.file),
        "received": "; ".join(error.received for error in item.errors),
        "allowed": first.allowed,
        "do": first.do,
    }


def _restored(values: Mapping[str, Any], sources: Sequence[SourceFile]) -> DataError:
    kind = TemplateError if values["code"] == TemplateError.code else DataError
    where = _full(values["where"], sources)
    return kind(values["received"], allowed=values["allowed"], do=values["do"], where=where)


def _place(where: str, sources: Sequence[SourceFile], file: int | None = None) -> list[Any]:
    """An address as the number of its file and the rest; -1 and the whole when it is in none of them."""
    for index in range(len(sources)) if file is None else (file,):
        path = f"{sources[index].path}:"
        if where.startswith(path):
            return [index, where[len(path) - 1 :]]
    return [-1, where]


def _full(place: Sequence[Any], sources: Sequence[SourceFile]) -> str:
    file, rest = int(place[0]), str(place[1])
    return rest if file < 0 else f"{sources[file].path}{rest}"
