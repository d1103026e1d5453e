"""A disk that fails, or dies, at its N-th operation."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from luthier.store.disk import Disk, RealDisk


class Killed(BaseException):
    """Stands for a process that is gone: nothing that catches errors may catch it."""


class FaultyDisk(Disk):
    """Passes operations on until the `fails_at`-th (1-based); that one raises, and so do all later ones if `forever`.

    With `kills` the process dies instead: from then on nothing reaches the disk, not even tidying up.
    """

    def __init__(self, fails_at: int, *, kills: bool = False, forever: bool = False, code: int = errno.EIO) -> None:
        self.real = RealDisk()
        self.fails_at = fails_at
        self.kills = kills
        self.forever = forever
        self.code = code
        self.operations: list[str] = []

    def _pass(self, name: str, path: Path) -> None:
        self.operations.append(f"{name} {path.name}")
        now = len(self.operations)
        if self.kills and now >= self.fails_at:
            raise Killed(name)
        if now == self.fails_at or (self.forever and now > self.fails_at):
            raise OSError(self.code, os.strerror(self.code), str(path))

    @property
    def reached(self) -> bool:
        return len(self.operations) >= self.fails_at

    def make_folder(self, path: Path) -> None:
        self._pass("make_folder", path)
        self.real.make_folder(path)

    def write_new(self, path: Path, data: bytes) -> None:
        try:
            self._pass("write_new", path)
        except (OSError, Killed):
            # A write that fails has usually written something.
            path.write_bytes(data[: len(data) // 2])
            raise
        self.real.write_new(path, data)

    def sync_file(self, path: Path) -> None:
        self._pass("sync_file", path)
        self.real.sync_file(path)

    def sync_folder(self, path: Path) -> None:
        self._pass("sync_folder", path)
        self.real.sync_folder(path)

    def rename(self, source: Path, target: Path) -> None:
        self._pass("rename", target)
        self.real.rename(source, target)

    def link(self, path: Path, target: str) -> None:
        self._pass("link", path)
        self.real.link(path, target)

    def remove(self, path: Path) -> None:
        self._pass("remove", path)
        self.real.remove(path)

    def free_bytes(self, folder: Path) -> int:
        return self.real.free_bytes(folder)
