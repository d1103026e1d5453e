"""Single files: replaced whole or not at all, durable when the call returns.

Idea: write beside the place, make the bytes durable, rename over the place, make the name durable. A reader sees the
old file or the new one, and so does a machine that loses power at any moment.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.core.errors import CorruptError
from luthier.store.disk import REAL, Disk, explained


def write_bytes(path: Path, data: bytes, *, disk: Disk = REAL) -> None:
    """Put `data` in the file `path`, replacing what is there. Raises StorageError; then the old file is unharmed."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with explained("write", path, needed_bytes=len(data)):
        written = False
        try:
            _forget(beside)
            disk.write_new(beside, data)
            disk.rename(beside, path)
            written = True
            disk.sync_folder(path.parent)
        finally:
            if not written:
                _forget(beside)


def write_text(path: Path, text: str, *, disk: Disk = REAL) -> None:
    """Put `text` in the file `path` as UTF-8."""
    write_bytes(path, text.encode("utf-8"), disk=disk)


def write_json(path: Path, values: Mapping[str, Any], *, disk: Disk = REAL) -> None:
    """Put `values` in the file `path`, indented for people. Numbers that are not finite are refused (ValueError)."""
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n", disk=disk)


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file. Raises StorageError, or CorruptError when it holds something else."""
    with explained("read", path):
        data = path.read_bytes()
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as failure:
        raise CorruptError(f"not valid JSON: {failure}", where=str(path)) from None
    if not isinstance(values, dict):
        raise CorruptError(f"a {type(values).__name__}", allowed="a mapping", where=str(path))
    return values


def _forget(beside: Path) -> None:
    # An earlier process with our number may have died here; and what we leave after an error is ours to remove.
    beside.unlink(missing_ok=True)
