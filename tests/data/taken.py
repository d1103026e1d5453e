"""Reading files whole, as tests may: all rows, all errors and the counts of one pass that renders nothing."""

from __future__ import annotations

from dataclasses import dataclass

from luthier.core.errors import DataError
from luthier.data.conversation import Row
from luthier.data.intake import FileReport, Intake, Kept
from luthier.data.reading.rows import SourceFile


@dataclass(frozen=True)
class Taken:
    """What came of files: `read` must be `kept` and `rejected` together, whatever the files are."""

    rows: list[Row]
    rejects: list[DataError]
    files: list[FileReport]
    read: int
    kept: int

    @property
    def rejected(self) -> int:
        return sum(file.rejected for file in self.files)


def take(*sources: SourceFile) -> Taken:
    """Read files and keep everything."""
    intake = Intake(sources, None)
    rows: list[Row] = []
    rejects: list[DataError] = []
    for item in intake:
        if isinstance(item, Kept):
            rows.append(item.row)
        else:
            rejects += item.errors
    assert intake.read == intake.kept + len(rejects) and intake.kept == len(rows)
    return Taken(rows, rejects, intake.files, intake.read, intake.kept)
