"""Memory that is used again: never while somebody holds it, and no more of it than is said."""

from __future__ import annotations

import gc
import threading
from mmap import PAGESIZE

import numpy as np

from luthier.kernels.floats import BFLOAT16, FLOAT32
from luthier.merge.buffers import Buffers

MEGA = 1 << 20


def address(array: np.ndarray) -> int:
    return int(array.ctypes.data)


def test_what_is_held_is_not_lent_again_and_what_is_let_go_is() -> None:
    """Breaks when a view does not hold the memory that it shows, or every array takes new pages."""
    buffers = Buffers(64 * MEGA)
    first = buffers.empty((512, 1024), BFLOAT16)
    assert first.shape == (512, 1024) and first.dtype == BFLOAT16 and address(first) % 64 == 0
    place, row = address(first), first[3:5].reshape(-1).view(np.uint16)
    row[:] = 7
    del first
    other = buffers.empty((512, 1024), BFLOAT16)
    assert address(other) != place and (row == 7).all()
    del row
    gc.collect()
    assert address(buffers.empty((500, 512), FLOAT32)) == place
    assert address(buffers.empty((40, 512), FLOAT32)) != place, "a small array takes no large piece"


def test_no_more_waits_than_is_said() -> None:
    """Breaks when memory only grows."""
    buffers = Buffers(3 * MEGA)
    for _ in range(3):
        held = [buffers.empty((MEGA + 65_536 * number,), np.dtype(np.uint8)) for number in range(5)]
        del held
        assert sum(map(len, buffers._waiting)) <= 3 * MEGA
    assert len(buffers._waiting) == 2


def test_memory_lies_in_its_pages_as_asked() -> None:
    """Breaks when rows of a result have to be copied to where the disk takes them."""
    buffers = Buffers(64 * MEGA)
    for at in (0, 8, 4_100, 123_456_789):
        own = buffers.empty((512, 1024), BFLOAT16, at=at)
        assert address(own) % PAGESIZE == at % PAGESIZE and own.shape == (512, 1024)


def test_threads_never_share_a_piece() -> None:
    """Breaks when two take one piece at the same time."""
    buffers, wrong = Buffers(8 * MEGA), list[int]()

    def work(number: int) -> None:
        for _ in range(200):
            own = buffers.empty((MEGA // 8,), np.dtype(np.uint8))
            own[::4096] = number
            if (own[::4096] != number).any():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
