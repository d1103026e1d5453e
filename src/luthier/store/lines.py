"""JSON lines: one record a line, appended as it happens, readable after any crash.

A process that dies while it writes leaves at most one torn line, at the end; a reader passes over it, a writer cuts it
off. A checkpoint remembers how long the file was (a byte cursor), and a resumed run cuts back to it, so no step is
logged twice. While the disk is full, lines wait in memory, so that a run need not end because it cannot say how it is
going; `sync` is where the lack of space becomes an error.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, Final, final

from luthier.core.errors import CorruptError, DiskFullError
from luthier.store.disk import explained

_BLOCK: Final = 1 << 16
MOST_HELD: Final = 64 * 2**20
"""Bytes of lines that may wait in memory for space."""


@final
class JsonLines:
    """A file of JSON records. One process appends at a time (the lock of the run sees to it); anybody may read.

    A thread that saves may call `sync` while another appends.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: FileIO | None = None
        self._held = bytearray()
        self._busy = threading.Lock()

    @property
    def length(self) -> int:
        """The length of the file in bytes once every line is in it: the cursor a checkpoint saves."""
        with self._busy:
            return self._written + len(self._held)

    @property
    def held_bytes(self) -> int:
        """Bytes of lines that wait for space."""
        return len(self._held)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record and hand it to the system, so that readers see it and a kill cannot take it back.

        On a full disk it waits in memory for the next call that finds space. Raises StorageError for other failures,
        DiskFullError when too much is waiting.
        """
        line = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        with self._busy:
            self._held += line.encode("utf-8", "backslashreplace") + b"\n"
            try:
                self._write_held()
            except DiskFullError:
                if len(self._held) > MOST_HELD:
                    raise

    def sync(self) -> None:
        """Wait until what was appended is durable; call it before a checkpoint that counts on it."""
        with self._busy:
            self._write_held()
            if self._file is not None:
                with explained("write", self.path):
                    os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let the file go; appending opens it again. Raises DiskFullError when lines still wait for space."""
        with self._busy:
            try:
                self._write_held()
            finally:
                if self._file is not None:
                    self._file.close()
                    self._file = None

    def truncate(self, cursor: int) -> int:
        """Cut the file back to `cursor` bytes; give back how many bytes it lacks (0 unless it was damaged)."""
        self._held.clear()
        self.close()
        missing = cursor - self._written
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
        start = max(0, self._written - most_bytes)
        if start:
            with explained("read", self.path), self.path.open("rb") as file:
                file.seek(start - 1)
                start += len(file.readline()) - 1
        return list(self.read(start))

    @property
    def _written(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def _write_held(self) -> None:
        """Write the lines that wait, all of them or none: a part of one would be taken for a torn line."""
        if not self._held:
            return
        with explained("append to", self.path, needed_bytes=len(self._held)):
            file = self._opened()
            before = os.fstat(file.fileno()).st_size
            done = 0
            try:
                while done < len(self._held):
                    done += os.write(file.fileno(), bytes(self._held[done:]))
            except OSError:
                os.ftruncate(file.fileno(), before)
                raise
            self._held.clear()

    def _opened(self) -> FileIO:
        if self._file is None:
            self._cut_torn_line()
            # Kept open from record to record; closed by `close` or with the process.
            self._file = FileIO(self.path, "ab")
        return self._file

    def _cut_torn_line(self) -> None:
        length = self._written
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
        except (ValueError, RecursionError) as failure:
            raise CorruptError(f"not valid JSON: {failure}", where=f"{self.path}:{number}") from None
        if not isinstance(record, dict):
            raise CorruptError(f"a {type(record).__name__}", allowed="a mapping", where=f"{self.path}:{number}")
        return record
