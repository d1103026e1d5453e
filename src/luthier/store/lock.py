"""The lock of a run: one process at a time, and a second one learns at once who has it.

Idea: the kernel holds the lock (`flock`), so it is gone with its process and is never stale; what is in the file
only says who holds it. It is never deleted, because two processes could then lock two files of one name.
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, final

from luthier.core.errors import RunLockedError
from luthier.store.disk import explained

_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")
_TAKEN: Final = (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK)
_NAMELESS_SECONDS: Final = 0.5
"""How long a process that is refused waits for the holder's name: the holder writes it right after taking the lock."""

_PAUSE_SECONDS: Final = 0.002


@final
@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lock."""

    pid: int
    host: str
    boot: str
    since: str

    @property
    def is_alive(self) -> bool:
        """Whether the process still runs; one on another machine is taken to."""
        if self.host != socket.gethostname():
            return True
        if self.boot != _boot():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True


@contextmanager
def locked(path: Path, *, name: str) -> Iterator[None]:
    """Hold the lock `path` during the block. Raises RunLockedError at once when another process has it."""
    with explained("lock", path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    owner = os.getpid()
    try:
        _take(handle, path, name)
        try:
            _describe(handle, path)
            yield
        finally:
            # A forked child shares the lock; when it comes by here it must not give its parent's away.
            if os.getpid() == owner:
                os.ftruncate(handle, 0)
                fcntl.flock(handle, fcntl.LOCK_UN)
    finally:
        os.close(handle)


def holder(path: Path) -> Holder | None:
    """Who holds the lock `path` by its own account; None when nobody does. For display only: it takes no lock."""
    try:
        found = Holder(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
    return found if found.is_alive else None


def _take(handle: int, path: Path, name: str) -> None:
    until = time.monotonic() + _NAMELESS_SECONDS
    while not _is_ours(handle, path):
        # Who has just taken it, or is about to let it go, is not named there yet, or no longer.
        user = holder(path)
        if user is not None or time.monotonic() > until:
            who = f"pid {user.pid} on {user.host} since {user.since}" if user else "another process"
            raise RunLockedError(
                f"{name} is used by {who}; nothing was changed", do="wait until it ends, or use another run directory"
            )
        time.sleep(_PAUSE_SECONDS)


def _is_ours(handle: int, path: Path) -> bool:
    """Take the lock; False when another process has it."""
    with explained("lock", path):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as failure:
            if failure.errno in _TAKEN:
                return False
            raise
    return True


def _describe(handle: int, path: Path) -> None:
    since = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S")
    own = Holder(pid=os.getpid(), host=socket.gethostname(), boot=_boot(), since=since)
    with explained("write", path):
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(asdict(own)).encode("utf-8"), 0)


def _boot() -> str:
    """What tells this boot of the machine from others, so that a reused process number is not mistaken."""
    try:
        return _BOOT.read_text(encoding="ascii").strip()
    except OSError:
        return ""
