"""Small JSON files beside weights: read strictly and with a limit, written so that equal content is equal bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.core.errors import CorruptError, DataError, StorageError
from luthier.data.strict_json import Place, decode_text, parse

MAX_BYTES = 16 * 2**20
"""Far above any settings file; below what takes long to parse."""


def read_object(path: Path) -> dict[str, Any]:
    """The object in `path`. Raises CorruptError for what is no strict JSON object, StorageError for no such file."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as failure:
        raise StorageError(f"{path} cannot be read: {failure.strerror}") from failure
    if len(raw) > MAX_BYTES:
        raise CorruptError(f"{path} is larger than {MAX_BYTES:,} bytes", allowed="a settings file")
    place = Place(str(path))
    try:
        value = parse(decode_text(raw, place), place)
    except DataError as failure:
        raise CorruptError(
            f"{path} is not valid JSON: {failure.received}",
            allowed=failure.allowed,
            do="fetch or save it again",
            where=failure.where,
        ) from None
    if not isinstance(value, dict):
        raise CorruptError(f"{path} holds a {type(value).__name__}", allowed="an object")
    return value


def write_object(path: Path, values: Mapping[str, Any]) -> None:
    """Write `values` with sorted keys."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
