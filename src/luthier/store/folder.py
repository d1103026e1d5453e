"""Folders that are there whole or not at all: the result of a run is written through here.

Idea: everything is written into a folder beside the place, made durable, and gets its name by one rename; then it is
read back and compared with its manifest. A folder that is to be replaced is moved aside first and removed only when
its successor has been verified.
Names beside a place `x`: `.tmp-x-<pid>` being written, `.old-x-<pid>` moved aside, `.del-x-<pid>` being removed.
Whoever writes must be the only one (the lock of a run sees to it): what a killed writer has left is cleaned up by the
next one, and a folder that it had moved aside comes back.
Source: the commit protocol of `store/checkpoints.py`, for one folder that has no number.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError

from luthier.core.errors import CorruptError, DiskFullError, RefusedError, StorageError
from luthier.store.disk import FREE_SPACE, NO_SPACE, REAL, Disk, explained, require_space
from luthier.store.manifest import Entry, Manifest, verify, write_manifest

Writer = Callable[[Path], Mapping[str, Entry] | None]
"""Fills a folder. It may tell what it has written by name: size and digest, taken before the disk had the bytes."""
_BESIDE: Final = ("tmp", "old", "del")


def write_folder(
    place: Path,
    writer: Writer,
    facts: Mapping[str, Any],
    *,
    disk: Disk = REAL,
    replace: bool = False,
    needed_bytes: int = 0,
    trust: bool = False,
) -> Manifest:
    """Let `place` hold what `writer` puts into the folder it is given; return once that is durable and verified.

    With `trust` files whose digests the writer has told are durable but not read back: for what can be made again.

    `facts` are plain JSON values for the manifest. With `replace` a folder that is there goes when the new one has
    been verified; without, it is refused. After an error `place` is what it was, and nothing is left beside it.
    """
    _make_parents(place, disk)
    recover_folder(place, disk=disk)
    if not replace:
        require_new(place)
    require_space(place.parent, needed_bytes, disk=disk)
    beside, old = _beside(place, "tmp"), _beside(place, "old")
    with _undone_on_error(place, lambda: _drop(beside, disk)):
        told: dict[str, Entry] = {}
        fill_folder(beside, writer, facts, disk=disk, needed_bytes=needed_bytes, told=told)
    with _undone_on_error(place, lambda: _put_back(place, beside, old, disk)), explained("write", place):
        if _is_there(place):
            disk.rename(place, old)
        disk.rename(beside, place)
        disk.sync_folder(place.parent)
        manifest = verify(place, trusted=told if trust else ())
    if _is_there(old):
        with explained("remove", old):
            disk.remove(old)
    return manifest


def require_new(place: Path) -> None:
    """Raise RefusedError for a place that something is at: for whoever has long work before it is written."""
    if _is_there(place):
        raise RefusedError(f"{place} is there already; nothing was changed", do="name a new folder")


def fill_folder(
    beside: Path,
    writer: Writer,
    facts: Mapping[str, Any],
    *,
    disk: Disk = REAL,
    needed_bytes: int | None = None,
    told: dict[str, Entry] | None = None,
) -> Manifest:
    """Make the folder `beside`, let `writer` fill it, and make it durable, its manifest last.

    What the writer tells of its files is put into `told`.
    """
    with explained("write", beside, needed_bytes=needed_bytes):
        disk.make_folder(beside)
        known = _call(writer, beside)
        if told is not None:
            told.update(known)
        readable = beside.stat().st_mode & 0o666
        for path in sorted(beside.rglob("*")):
            if path.is_dir() and not path.is_symlink():
                disk.sync_folder(path)
            elif path.is_file():
                # safetensors writes for the owner only; whoever may enter the folder may read what is in it.
                path.chmod(readable)
                disk.sync_file(path)
        manifest = write_manifest(beside, facts, disk=disk, known=known)
        disk.sync_folder(beside)
    return manifest


def recover_folder(place: Path, *, disk: Disk = REAL) -> None:
    """Clean up after a writer that was killed: `place` then holds the old folder or the new one, whole.

    A folder that was moved aside comes back unless its successor is in place and verifies.
    """
    if not place.parent.is_dir():
        return
    with explained("clean up", place.parent):
        for old in _leftovers(place, "old"):
            if _is_whole(place):
                disk.remove(old)
                continue
            if _is_there(place):
                disk.rename(place, _beside(place, "del"))
            disk.rename(old, place)
            disk.sync_folder(place.parent)
        for path in [*_leftovers(place, "tmp"), *_leftovers(place, "del")]:
            disk.remove(path)


@contextmanager
def _undone_on_error(place: Path, undo: Callable[[], None]) -> Iterator[None]:
    """Put things back as they were when the block fails; a kill leaves that to `recover_folder`."""
    try:
        yield
    except BaseException as error:
        try:
            undo()
        except OSError as failure:
            error.add_note(f"{place.parent} could not be tidied up ({failure.strerror}); the next write there will")
        raise


def _drop(beside: Path, disk: Disk) -> None:
    if _is_there(beside):
        disk.remove(beside)


def _put_back(place: Path, beside: Path, old: Path, disk: Disk) -> None:
    if not _is_there(beside):
        disk.rename(place, beside)
    if _is_there(old):
        disk.rename(old, place)
    disk.sync_folder(place.parent)
    disk.remove(beside)


def _call(writer: Writer, folder: Path) -> Mapping[str, Entry]:
    try:
        return writer(folder) or {}
    except SafetensorError as failure:
        # The Rust side has one kind of error for everything, and the system's number in its text.
        full = any(f"os error {number})" in str(failure) for number in NO_SPACE)
        kind = DiskFullError if full else StorageError
        raise kind(f"cannot write {folder}: {failure}", do=FREE_SPACE) from failure


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _is_whole(place: Path) -> bool:
    try:
        verify(place)
    except CorruptError:
        return False
    return True


def _leftovers(place: Path, kind: str) -> list[Path]:
    pattern = re.compile(rf"\.{kind}-{re.escape(place.name)}-\d+")
    return sorted(path for path in place.parent.iterdir() if pattern.fullmatch(path.name))


def _beside(place: Path, kind: str) -> Path:
    return place.with_name(f".{kind}-{place.name}-{os.getpid()}")


def _make_parents(place: Path, disk: Disk) -> None:
    missing = [folder for folder in place.parents if not folder.is_dir()]
    with explained("make", place.parent):
        for folder in reversed(missing):
            disk.make_folder(folder)
            disk.sync_folder(folder.absolute().parent)
