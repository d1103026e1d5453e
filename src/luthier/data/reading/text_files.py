"""Files as bytes and lines: opened, decoded, bounded; whatever is wrong with them as an error with an address.

Idea: nothing here holds more than one line, or one piece, of a file; a line without an end is passed over in pieces.
Use when: a reader wants the text of a file, by `lines` where a bad line must not hide the next, else by `pieces`.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Generator
from io import BufferedIOBase
from pathlib import Path

from luthier.core.errors import DataError, StorageError
from luthier.data.strict_json import Place, decode_text, is_wide

MAX_LINE_BYTES = 64 * 2**20
"""A longer line, cell or text is a broken file, not a row: it is refused without being held in memory."""
PIECE_BYTES = 2**20
"""How much of a file is read at once where lines do not matter."""
_BOM = b"\xef\xbb\xbf"


def is_regular(path: Path) -> bool:
    """Whether a regular file is there. Raises StorageError where that cannot even be asked."""
    try:
        return path.is_file()
    except (OSError, ValueError) as failure:
        raise unreadable(path, failure) from failure


def unreadable(path: Path, failure: OSError | ValueError) -> StorageError:
    """The error for a path that the system refuses to look at."""
    words = failure.strerror if isinstance(failure, OSError) and failure.strerror else str(failure)
    return StorageError(f"cannot be read: {words}", do="look at its name and permissions", where=str(path))


def open_bytes(path: Path) -> BufferedIOBase:
    """A file, unpacked where its name ends in .gz. Raises StorageError."""
    try:
        return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")
    except OSError as failure:
        raise unreadable(path, failure) from failure


def _read(handle: BufferedIOBase, path: Path, line: int, *, limit: int, whole_line: bool = True) -> bytes:
    """One line or its first `limit` bytes, or just bytes; an unreadable stream is a DataError or StorageError."""
    try:
        return handle.readline(limit) if whole_line else handle.read(limit)
    except (EOFError, zlib.error, gzip.BadGzipFile) as failure:
        raise DataError(
            f"the compressed file is damaged or cut short ({failure}); nothing after this line was read",
            do="fetch or compress it again",
            where=f"{path}:{line}:1",
        ) from None
    except OSError as failure:
        raise unreadable(path, failure) from failure


def lines(path: Path) -> Generator[tuple[int, str | DataError]]:
    """Line number and line with its end, or what is wrong with it; the last item may be why the file ends there."""
    with open_bytes(path) as handle:
        number, name = 0, str(path)
        while True:
            number += 1
            try:
                raw = _read(handle, path, number, limit=MAX_LINE_BYTES + 1)
                if number == 1 and is_wide(raw):
                    decode_text(raw, Place(str(path)))
                if len(raw) > MAX_LINE_BYTES:
                    while raw and not raw.endswith(b"\n"):
                        raw = _read(handle, path, number, limit=PIECE_BYTES)
                    yield number, too_long("a line", "one row a line", f"{path}:{number}:1")
                    continue
            except DataError as failure:
                yield number, failure
                return
            if not raw:
                return
            try:
                text = decode_text(raw, Place(name, number))
            except DataError as failure:
                yield number, failure
                continue
            yield number, text


def too_long(what: str, allowed: str, where: str, do: str = "") -> DataError:
    """The error for what is longer than any row."""
    return DataError(f"{what} longer than {MAX_LINE_BYTES:,} bytes", allowed=allowed, do=do, where=where)


def pieces(path: Path) -> Generator[str]:
    """The text of a file in pieces of whole characters. Raises DataError where it stops being text."""
    with open_bytes(path) as handle:
        place, kept = Place(str(path)), b""
        while raw := _read(handle, path, place.line, limit=PIECE_BYTES, whole_line=False):
            raw = kept + raw
            cut = _whole_characters(raw)
            raw, kept = raw[:cut], raw[cut:]
            try:
                yield decode_text(raw, place)
            except DataError as failure:
                # The whole lines before the damage are still text.
                yield decode_text(raw[: _line_of_damage(raw, place)], place)
                words = f"{failure.received}; nothing after it was read"
                raise DataError(words, allowed=failure.allowed, do=failure.do, where=failure.where) from None
            breaks = raw.count(b"\n")
            first = 3 if place == Place(str(path)) and raw.startswith(_BOM) else 0
            column = len(raw) - raw.rfind(b"\n") if breaks else place.column + len(raw) - first
            place = Place(place.name, place.line + breaks, column)
        if kept:
            yield decode_text(kept, place)


def _line_of_damage(raw: bytes, place: Place) -> int:
    """The offset of the first line of `raw` that is no text."""
    start = 0
    while (end := raw.find(b"\n", start) + 1) > 0:
        try:
            decode_text(raw[start:end], Place(place.name, place.line, place.column if start == 0 else 2))
        except DataError:
            break
        start = end
    return start


def _whole_characters(raw: bytes) -> int:
    """How many bytes of `raw` are left when a UTF-8 character that is cut at its end is taken off."""
    for back in range(1, min(4, len(raw) + 1)):
        byte = raw[-back]
        if byte & 0xC0 != 0x80:
            size = 1 if byte < 0xC0 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(raw) - back if size > back else len(raw)
    return len(raw)


def first_line(path: Path) -> str:
    """The first line that is not blank, or its first part; empty when it cannot be read, which the walk then tells."""
    with open_bytes(path) as handle:
        try:
            while raw := _read(handle, path, 1, limit=MAX_LINE_BYTES):
                if is_wide(raw):
                    return ""
                if text := raw.removeprefix(_BOM).decode("utf-8", "replace").strip():
                    return text
        except DataError:
            return ""
    return ""
