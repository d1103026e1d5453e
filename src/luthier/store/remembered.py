"""What can be found out again, kept in the cache: read where it can be, written where there is room."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from luthier.core.errors import LuthierError
from luthier.store.files import read_json, write_json


def recalled(path: Path) -> dict[str, Any]:
    """What is remembered in a file; nothing when it is not there or cannot be read: it can be made again."""
    try:
        return read_json(path) if path.is_file() else {}
    except LuthierError:
        return {}


def remember(path: Path, values: Mapping[str, Any]) -> None:
    """Keep `values`. A cache that cannot be written costs the time to find them out again, and no run."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, json.loads(json.dumps(values)))
    except (LuthierError, OSError):
        return


@cache
def code_of(parts: tuple[str, ...]) -> tuple[str, ...]:
    """Names, sizes and times of the files of this package that decide: in a checkout they change between versions."""
    home = Path(__file__).parents[1]
    found = []
    for part in parts:
        place = home / part
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if path.suffix in (".py", ".cpp", ".h"):
                stat = path.stat()
                found.append(f"{path.relative_to(home)} {stat.st_size} {stat.st_mtime_ns}")
    return tuple(found)
