"""Files that clients upload and that fine-tunes make: a folder each, by an id that we make. No name is a path here."""

from __future__ import annotations

import json
import re
import secrets
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, final

from luthier.core.errors import DataError
from luthier.server.errors import NotServedError
from luthier.store.files import read_json, write_json

_ID: Final = re.compile(r"file-[0-9a-f]{24}")
CONTENT: Final = "content.jsonl"


@final
@dataclass(frozen=True)
class Stored:
    """What is known of a file."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str

    def as_plain(self) -> dict[str, Any]:
        """As the API tells it."""
        return {**asdict(self), "object": "file", "status": "processed"}


@final
class Files:
    """The files below a folder, which is made when the first one comes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()

    def all(self) -> list[Stored]:
        """Every file, the newest first."""
        found = [self._read(path.name) for path in self.folder.glob("file-*") if _ID.fullmatch(path.name)]
        return sorted((each for each in found if each), key=lambda each: (-each.created_at, each.id))

    def add(self, name: str, content: bytes, *, purpose: str) -> Stored:
        """Keep a file."""
        made = Stored(f"file-{secrets.token_hex(12)}", len(content), int(time.time()), name[:200], purpose)
        place = self.folder / made.id
        with self._lock:
            place.mkdir(parents=True)
            (place / CONTENT).write_bytes(content)
            # The file is there once this is.
            write_json(place / "file.json", asdict(made))
        return made

    def get(self, name: str) -> Stored:
        """What is known of a file. Raises NotServedError when there is none of that id."""
        found = self._read(name) if _ID.fullmatch(name) else None
        if found is None:
            raise NotServedError(f"no file is called {name!r:.80}", do="GET /v1/files lists them")
        return found

    def path(self, name: str) -> Path:
        """Where the content of a file is."""
        return self.folder / self.get(name).id / CONTENT

    def remove(self, name: str) -> None:
        """Forget a file."""
        with self._lock:
            shutil.rmtree(self.folder / self.get(name).id)

    def _read(self, name: str) -> Stored | None:
        place = self.folder / name / "file.json"
        if not place.is_file() or place.is_symlink():
            return None
        said: Mapping[str, Any] = read_json(place)
        return Stored(str(said["id"]), int(said["bytes"]), int(said["created_at"]), str(said["filename"]),
                      str(said["purpose"]))  # fmt: skip


def require_rows(content: bytes) -> int:
    """The number of rows of a JSONL file. Raises DataError with the line of the first that is no JSON object."""
    count = 0
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as failure:
            row = f"no JSON: {failure}"
        if not isinstance(row, dict):
            raise DataError(f"{row!r:.80}", allowed="a JSON object on each line", where=f"line {number}")
        count += 1
    if not count:
        raise DataError(f"a file of {len(content)} bytes without a row", allowed="at least one JSON object")
    return count
