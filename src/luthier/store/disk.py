"""The disk: the few operations through which the store changes files, each able to fail, none of them retried.

Idea: whatever luthier must not lose goes through one of these. Tests hand in a disk that fails at its N-th operation,
so every failure between two operations is tried. An OSError becomes a StorageError with the file, the reason and, when
space is the reason, how much was needed and how much is free.
"""

from __future__ import annotations

import errno
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, final

from luthier.core.errors import DiskFullError, LuthierError, StorageError

NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FREE_SPACE: Final = "free space, then run the same command again"


class Disk(ABC):
    """Changes files. Every method may raise OSError."""

    @abstractmethod
    def make_folder(self, path: Path) -> None:
        """Make one folder; its parent exists, it does not."""

    @abstractmethod
    def write_new(self, path: Path, data: bytes) -> None:
        """Write a file that does not exist, and wait until its bytes are durable."""

    @abstractmethod
    def sync_file(self, path: Path) -> None:
        """Wait until the bytes of a file are durable."""

    @abstractmethod
    def sync_folder(self, path: Path) -> None:
        """Wait until the names in a folder are durable."""

    @abstractmethod
    def rename(self, source: Path, target: Path) -> None:
        """Give `source` the name `target`, in one step; a file or link there is replaced."""

    @abstractmethod
    def link(self, path: Path, target: str) -> None:
        """Make a symbolic link."""

    @abstractmethod
    def remove(self, path: Path) -> None:
        """Remove a file, a link, or a folder with all it holds."""

    @abstractmethod
    def free_bytes(self, folder: Path) -> int:
        """Bytes that may still be written below `folder`."""


@final
class RealDisk(Disk):
    """The file system."""

    def make_folder(self, path: Path) -> None:
        path.mkdir()

    def write_new(self, path: Path, data: bytes) -> None:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(handle, rest) :]
            os.fsync(handle)
        finally:
            os.close(handle)

    def sync_file(self, path: Path) -> None:
        _sync(path, os.O_RDONLY)

    def sync_folder(self, path: Path) -> None:
        _sync(path, os.O_RDONLY | os.O_DIRECTORY)

    def rename(self, source: Path, target: Path) -> None:
        source.replace(target)

    def link(self, path: Path, target: str) -> None:
        path.symlink_to(target)

    def remove(self, path: Path) -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()

    def free_bytes(self, folder: Path) -> int:
        return shutil.disk_usage(folder).free


REAL: Final = RealDisk()


@contextmanager
def explained(doing: str, path: Path, *, needed_bytes: int | None = None) -> Iterator[None]:
    """Turn an OSError of the block into a StorageError: what was being done, to which file, and why it failed."""
    try:
        yield
    except LuthierError:
        raise
    except OSError as failure:
        place = Path(failure.filename) if isinstance(failure.filename, str) else path
        reason = failure.strerror or str(failure) or type(failure).__name__
        if failure.errno in NO_SPACE:
            space = _space(path, needed_bytes)
            raise DiskFullError(f"cannot {doing} {place}: {reason}{space}", do=FREE_SPACE) from failure
        raise StorageError(f"cannot {doing} {place}: {reason}") from failure


def require_space(folder: Path, needed_bytes: int, *, disk: Disk = REAL) -> None:
    """Refuse, before anything is written, what will not fit."""
    with explained("ask for the free space of", folder):
        free = disk.free_bytes(folder)
    if free < needed_bytes:
        raise DiskFullError(f"{folder}: {needed_bytes:,} bytes needed, {free:,} free", do=FREE_SPACE)


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _space(path: Path, needed_bytes: int | None) -> str:
    folder = next((parent for parent in (path, *path.parents) if parent.is_dir()), Path())
    needed = "" if needed_bytes is None else f"{needed_bytes:,} bytes needed, "
    return f" ({needed}{shutil.disk_usage(folder).free:,} free)"
