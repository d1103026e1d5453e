"""Memory that is used again: what blocks are read into and merged into, taken from the system once.

Idea: memory that is new costs a fault and a page of zeros for every page, which for numbers that are only passing takes
as long as copying them. An array from here is the system's pages as any other; when nobody holds it or a view of it any
more, its memory waits for the next one of about that size. What waits is bounded: the one that has waited longest goes
back to the system first.
Cost: pages that wait, `most` bytes of them at most.
Use when: arrays of a megabyte come and go. Not when: they are small: those are numpy's own.
"""

from __future__ import annotations

import weakref
from math import prod
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, PAGESIZE, mmap
from threading import RLock
from typing import Final, final

import numpy as np

from luthier.kernels.floats import DType

_SMALL: Final = 1 << 16
"""Bytes below which memory is numpy's."""
_STEP: Final = 1 << 16
"""Sizes are multiples of this."""
_LARGER: Final = 2
"""A piece may be so many times as large as what it is taken for."""


@final
class Buffers:
    """Arrays whose memory is used again. Any thread may ask for one."""

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, RLock()
        self._waiting: list[mmap] = []
        """Those that have waited longest come first."""
        # Python may let an array go at any time, in the middle of `_taken` too: the lock lets its own thread in again.

    def empty(self, shape: tuple[int, ...], dtype: DType, *, at: int = 0) -> np.ndarray:
        """An array of any numbers, as `np.empty` makes one; a large one lies in pages as byte `at` of a file does."""
        size, lead = prod(shape) * dtype.itemsize, at % PAGESIZE
        if size < _SMALL:
            return np.empty(shape, dtype)
        piece = self._taken(lead + size)
        whole = np.frombuffer(piece, np.uint8)
        # Views hold what lies directly over the memory, so this one goes last.
        weakref.finalize(whole, self._back, piece).atexit = False
        return whole[lead : lead + size].view(dtype).reshape(shape)

    def _taken(self, size: int) -> mmap:
        with self._lock:
            fitting = [piece for piece in self._waiting if size <= len(piece) <= _LARGER * size]
            if fitting:
                best = min(reversed(fitting), key=len)
                # By identity: equal bytes are not the same memory.
                self._waiting = [piece for piece in self._waiting if piece is not best]
                return best
        return mmap(-1, -(-size // _STEP) * _STEP, flags=MAP_PRIVATE | MAP_ANONYMOUS)

    def _back(self, piece: mmap) -> None:
        with self._lock:
            self._waiting.append(piece)
            held = sum(map(len, self._waiting))
            while held > self._most:
                held -= len(self._waiting.pop(0))
