"""A large file on its way to the disk: what comes in order goes past the page cache, with its digest.

Idea: a file of a model's size fills the page cache with bytes that nobody asks for again, and the system writes them
back in small pieces, late, all at the end: until they are durable takes several times as long as the disk needs for
them. So threads write with O_DIRECT, which the disk takes at its own speed. Bytes that lie in memory as they will in
the file, with the same remainder of a block, are written from where they lie; others are gathered in aligned buffers,
one of which is filled while others are written. What comes out of order, the ends that are not aligned, and
everything on file systems that know no such writing goes through the page cache, and is made durable beside the work.
The digest is that of the bytes as they were handed over, so that reading the file back later proves the disk.
Source: open(2), O_DIRECT: memory, offset and length are multiples of the block.
Cost: a few buffers of 2 MB while a file is being written in order, and what is being written is held until it is.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from mmap import mmap
from pathlib import Path
from threading import Lock
from typing import Final, final

import numpy as np

from luthier.core.errors import StorageError
from luthier.store.disk import explained
from luthier.store.manifest import Entry

PIECE: Final = 1 << 21
"""Bytes of a buffer."""
BLOCK: Final = 4096
"""What offsets and lengths are multiples of: enough for every disk's block."""
_WRITES: Final = 3
"""Writes under way at once: the disk has the next one when it is done with the one before."""
HELD: Final = _WRITES + 1
"""What was handed over in order is held until it is written: so many pieces at most."""
_LARGE: Final = 1 << 17
"""Bytes that are worth a write of their own; fewer are gathered."""
_SYNC: Final = 1 << 27
"""Bytes in the page cache after which they are made durable beside the writing, so that not all is left for the end."""
_FIRST: Final = 1 << 25
"""The same for the first time: until then the disk has nothing to do."""
_REFUSED: Final = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)
"""What a file system says that knows no O_DIRECT."""


@final
class LargeFile:
    """A new file of a size that is known. Any thread may write; each byte is written once, and what was handed over
    stays as it is until the file is finished.

    Raises DiskFullError, before a byte of it is written, where the disk has no room for it; StorageError for all else.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        self._digest, self._end = hashlib.sha256(), 0
        """What came in order, and where it ends."""
        self._lock, self._cached = Lock(), _SYNC - _FIRST
        self._writing, self._syncing = ThreadPoolExecutor(_WRITES, "direct"), ThreadPoolExecutor(1, "sync")
        self._written: deque[Future[None]] = deque()
        self._syncs: list[Future[None]] = []
        self._buffers: tuple[mmap, ...] = ()
        self._filled = 0
        with explained("write", path, needed_bytes=size):
            self._number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            try:
                # All of the room now: a disk that is too small is found before the work and not in the middle of it.
                os.posix_fallocate(self._number, 0, size)
                self._direct = _opened_direct(path)
            except BaseException:
                os.close(self._number)
                raise

    def write(self, data: memoryview, at: int) -> None:
        """Put bytes at an offset. What follows on what came before is fast; the rest goes through the page cache."""
        with self._lock:
            in_order = at == self._end
        if not in_order:
            self._put(data, at)
            return
        # Only one thread can have the bytes that come next.
        self._digest.update(data)
        self._append(data)
        with self._lock:
            self._end = at + len(data)

    def settle(self) -> None:
        """Begin to make durable what has been written; after it the file can be read."""
        if self._filled:
            # It stays in its buffer, and is written again with the rest of it where more comes.
            begin = self._end - self._filled
            self._put(memoryview(self._buffers[0])[: self._filled], begin)
        self._wait()
        with self._lock:
            self._sync()

    def finish(self) -> Entry:
        """Make the file durable; its size and the digest of what was handed over."""
        self.settle()
        with explained("write", self.path, needed_bytes=self.size):
            # The system tells of a lost page once: every answer is heard.
            for sync in self._syncs:
                sync.result()
            os.fsync(self._number)
        with explained("read", self.path):
            while self._end < self.size:
                piece = os.pread(self._number, 1 << 24, self._end)
                if not piece:
                    raise StorageError(f"{self.path} ends at byte {self._end:,} of {self.size:,}", do="write it again")
                self._digest.update(piece)
                self._end += len(piece)
        return Entry(self.size, self._digest.hexdigest())

    def close(self) -> None:
        """Let go of file, threads and buffers, whether all was written or not."""
        self._writing.shutdown()
        self._syncing.shutdown()
        for number in (self._number, self._direct):
            if number is not None:
                os.close(number)
        self._direct, self._buffers = None, ()

    def _append(self, data: memoryview) -> None:
        """From where it lies to the disk, but for its ends; or into a buffer."""
        at = self._end
        head = -at % BLOCK
        body = max(len(data) - head, 0) // BLOCK * BLOCK
        if body >= _LARGE and (np.frombuffer(data, np.uint8).ctypes.data + head) % BLOCK == 0:
            # A buffer begins at a block, so the head makes its blocks whole.
            self._gather(data[:head], at)
            self._turn(at + head, data[head : head + body])
            data, at = data[head + body :], at + head + body
        at = self._gather(data, at)
        if at == self.size and self._buffers:
            # A model has many such files: one that is whole keeps no buffers.
            self._put(memoryview(self._buffers[0])[: self._filled], at - self._filled)
            self._wait()
            self._buffers, self._filled = (), 0

    def _gather(self, data: memoryview, at: int) -> int:
        """Into the first buffer, and to the disk when it is full; where the bytes end."""
        while data:
            if not self._buffers:
                self._buffers = tuple(mmap(-1, PIECE) for _ in range(HELD + 1))
            count = min(len(data), PIECE - self._filled)
            into = np.frombuffer(self._buffers[0], np.uint8)
            # numpy copies without Python's lock.
            into[self._filled : self._filled + count] = np.frombuffer(data[:count], np.uint8)
            self._filled, data, at = self._filled + count, data[count:], at + count
            if self._filled == PIECE:
                self._turn(at)
        return at

    def _turn(self, at: int, behind: memoryview | None = None) -> None:
        """Write what was gathered up to `at`, and what lies `behind` it; the other buffers are filled meanwhile."""
        self._wait(HELD - 1)
        pieces = [] if behind is None else [behind]
        if self._filled:
            pieces.insert(0, memoryview(self._buffers[0])[: self._filled])
            at -= self._filled
            self._buffers, self._filled = (*self._buffers[1:], self._buffers[0]), 0
        self._written.append(self._writing.submit(self._put_direct, pieces, at))

    def _wait(self, most: int = 0) -> None:
        """Until no more than so many writes are left."""
        while len(self._written) > most:
            self._written.popleft().result()

    def _put_direct(self, pieces: Sequence[memoryview], at: int) -> None:
        """Past the page cache, or through it where that is refused."""
        for rest in pieces:
            end = at + len(rest)
            if self._direct is not None:
                try:
                    count = os.pwrite(self._direct, rest, at)
                    rest, at = rest[count:], at + count
                except OSError as failure:
                    if failure.errno not in _REFUSED:
                        with explained("write", self.path, needed_bytes=self.size):
                            raise
            # The rest of a piece that was cut short: the next try tells why, or writes it.
            self._put(rest, at)
            at = end

    def _put(self, data: memoryview, at: int) -> None:
        """Through the page cache."""
        with explained("write", self.path, needed_bytes=self.size):
            while data:
                count = os.pwrite(self._number, data, at)
                data, at = data[count:], at + count
                with self._lock:
                    self._cached += count
        with self._lock:
            # One at a time: the next one takes what has come meanwhile.
            if self._cached >= _SYNC and all(sync.done() for sync in self._syncs):
                self._sync()

    def _sync(self) -> None:
        self._cached = 0
        self._syncs.append(self._syncing.submit(os.fdatasync, self._number))


def _opened_direct(path: Path) -> int | None:
    """The file once more for writing past the page cache; None where the file system knows no such thing."""
    flag = getattr(os, "O_DIRECT", None)
    if flag is None:
        return None
    try:
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC | flag)
    except OSError as failure:
        if failure.errno not in _REFUSED:
            raise
        return None
