"""JSON lines: one record a line, appended as it happens, readable after any crash.

A process that dies while it writes leaves at most one torn line, at the end; a reader passes over it, a writer cuts it
off. A checkpoint remembers how long the file was (a byte cursor), and a resumed run cuts back to it, so no step is
logged twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final, final

from luthier.core.errors import CorruptError
from luthier.store.disk import explained

_BLOCK: Final = 1 << 16


@final
class JsonLines:
    """A file of JSON records. One process appends at a time (the lock of the run sees to it); anybody may read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None

    @property
    def length(self) -> int:
        """The length of the file in bytes: the cursor a checkpoint saves."""
        return self.path.stat().st_size if self.path.exists() else 0

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record and hand it to the system, so that readers see it and a kill cannot take it back."""
        line = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        data = line.encode("utf-8", "backslashreplace") + b"\n"
        with explained("append to", self.path, needed_bytes=len(data)):
            file = self._opened()
            file.write(data)
            file.flush()

    def sync(self) -> None:
        """Wait until what was appended is durable; call it before a checkpoint that counts on it."""
        if self._file is not None:
            with explained("write", self.path):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let the file go; appending opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def truncate(self, cursor: int) -> int:
        """Cut the file back to `cursor` bytes; give back how many bytes it lacks (0 unless it was damaged)."""
        self.close()
        missing = cursor - self.length
        if missing < 0:
            with explained("cut back", self.path), self.path.open("r+b") as file:
                file.truncate(cursor)
                os.fsync(file.fileno())
        return max(missing, 0)

    def read(self, start: int = 0) -> Iterator[dict[str, Any]]:
        """The records from byte `start` on. A torn last line is passed over; any other bad line is a CorruptError."""
        if not self.path.exists():
            return
        with explained("read", self.path), self.path.open("rb") as file:
            file.seek(start)
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n"):
                    yield self._record(line, number)

    def tail(self, most_bytes: int = _BLOCK) -> list[dict[str, Any]]:
        """The records in the last `most_bytes` of the file."""
        start = max(0, self.length - most_bytes)
        if start:
            with explained("read", self.path), self.path.open("rb") as file:
                file.seek(start - 1)
                start += len(file.readline()) - 1
        return list(self.read(start))

    def _opened(self) -> BinaryIO:
        if self._file is None:
            self._cut_torn_line()
            # Kept open from record to record; closed by `close` or with the process.
            self._file = self.path.open("ab")
        return self._file

    def _cut_torn_line(self) -> None:
        length = self.length
        if length == 0:
            return
        with self.path.open("r+b") as file:
            end = length
            while end > 0:
                start = max(0, end - _BLOCK)
                file.seek(start)
                newline = file.read(end - start).rfind(b"\n")
                if newline >= 0:
                    end = start + newline + 1
                    break
                end = start
            if end < length:
                file.truncate(end)

    def _record(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except ValueError as failure:
            raise CorruptError(f"not valid JSON: {failure}", where=f"{self.path}:{number}") from None
        if not isinstance(record, dict):
            raise CorruptError(f"a {type(record).__name__}", allowed="a mapping", where=f"{self.path}:{number}")
        return record
