"""A large file on its way to the disk: bytes where they belong, the digest of what was handed over, every failure."""

from __future__ import annotations

import errno
import hashlib
import os
import random
from mmap import PAGESIZE, mmap
from pathlib import Path

import numpy as np
import pytest

from luthier.core.errors import DiskFullError, StorageError
from luthier.store import large_file
from luthier.store.large_file import BLOCK, LargeFile

PIECE = 4 * BLOCK
DATA = random.Random(0).randbytes(3 * PIECE + 1234)
PWRITE, OPEN = os.pwrite, os.open


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_file, "PIECE", PIECE)


def written(path: Path, cuts: list[int], *, order: list[int] | None = None, settle: bool = False) -> LargeFile:
    """DATA in pieces that end at `cuts`, in an order."""
    pieces = list(zip([0, *cuts], [*cuts, len(DATA)], strict=True))
    file = LargeFile(path, len(DATA))
    for number in order or range(len(pieces)):
        begin, end = pieces[number]
        file.write(memoryview(DATA)[begin:end], begin)
        if settle:
            file.settle()
            assert path.read_bytes()[begin:end] == DATA[begin:end]
    return file


@pytest.mark.parametrize("settle", [False, True])
@pytest.mark.parametrize("cuts", [[], [1], [PIECE], [BLOCK, 2 * PIECE], [10, PIECE - 1, PIECE + 1, 2 * PIECE + BLOCK]])
def test_bytes_are_where_they_belong(tmp_path: Path, cuts: list[int], settle: bool) -> None:
    """Breaks when a piece is written at another place, an end that is not aligned is lost, or settling loses some."""
    file = written(tmp_path / "x", cuts, settle=settle)
    entry = file.finish()
    file.close()
    assert (tmp_path / "x").read_bytes() == DATA
    assert (entry.bytes, entry.sha256) == (len(DATA), hashlib.sha256(DATA).hexdigest())


@pytest.mark.parametrize("seed", range(6))
def test_any_order_gives_the_same_file(tmp_path: Path, seed: int) -> None:
    """Breaks when what comes out of order is overwritten by a piece that ends there, or is missing in the digest."""
    draw = random.Random(seed)
    cuts = sorted(draw.sample(range(1, len(DATA)), 12))
    order = list(range(13))
    head = draw.randrange(12)
    order[head:] = draw.sample(order[head:], 13 - head)
    file = written(tmp_path / "x", cuts, order=order, settle=seed % 2 == 0)
    entry = file.finish()
    file.close()
    assert (tmp_path / "x").read_bytes() == DATA and entry.sha256 == hashlib.sha256(DATA).hexdigest()


def direct_number(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The handles that were opened for writing past the page cache, as they come."""
    found: list[int] = []

    def opened(path: Path, flags: int, *rest: int) -> int:
        number = OPEN(path, flags, *rest)
        if flags & os.O_DIRECT:
            found.append(number)
        return number

    monkeypatch.setattr(os, "open", opened)
    return found


def test_whole_pieces_go_past_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when the page cache is filled with a model that nobody reads."""
    numbers, sizes = direct_number(monkeypatch), list[int]()

    def put(number: int, data: memoryview, at: int) -> int:
        if number in numbers:
            sizes.append(len(data))
        return PWRITE(number, data, at)

    monkeypatch.setattr(os, "pwrite", put)
    file = written(tmp_path / "x", [100])
    file.finish()
    file.close()
    if not numbers:
        pytest.skip("this file system knows no O_DIRECT")
    assert sizes == [PIECE] * 3


def placed(begin: int, end: int, *, off: int = 0) -> memoryview:
    """DATA from `begin` to `end`, in memory as it will lie in the pages of the file, or `off` bytes behind."""
    lead = begin % PAGESIZE + off
    pages = memoryview(mmap(-1, lead + end - begin))
    pages[lead:] = DATA[begin:end]
    return pages[lead:]


@pytest.mark.parametrize("off", [0, 1])
@pytest.mark.parametrize("cuts", [[100], [BLOCK, 7 * BLOCK], [10, 2 * BLOCK + 10, 2 * BLOCK + 20, 9 * BLOCK + 1]])
def test_what_lies_in_memory_as_in_the_file_is_not_gathered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuts: list[int], off: int
) -> None:
    """Breaks when it is copied for nothing, its ends are lost, or memory that the disk does not take is given to it."""
    monkeypatch.setattr(large_file, "_LARGE", 2 * BLOCK)
    numbers, addresses = direct_number(monkeypatch), set[int]()

    def put(number: int, data: memoryview, at: int) -> int:
        address = np.frombuffer(data, np.uint8).ctypes.data if len(data) else 0
        if number in numbers:
            assert address % BLOCK == len(data) % BLOCK == at % BLOCK == 0
            addresses.add(address)
        return PWRITE(number, data, at)

    monkeypatch.setattr(os, "pwrite", put)
    file = LargeFile(tmp_path / "x", len(DATA))
    pieces = list(zip([0, *cuts], [*cuts, len(DATA)], strict=True))
    held = [placed(begin, end, off=off) for begin, end in pieces]
    for (begin, _), data in zip(pieces, held, strict=True):
        file.write(data, begin)
    entry = file.finish()
    file.close()
    assert (tmp_path / "x").read_bytes() == DATA and entry.sha256 == hashlib.sha256(DATA).hexdigest()
    if not numbers:
        pytest.skip("this file system knows no O_DIRECT")
    bodies = {np.frombuffer(data, np.uint8).ctypes.data + -begin % BLOCK
              for (begin, end), data in zip(pieces, held, strict=True) if end - begin >= 3 * BLOCK}  # fmt: skip
    assert bodies <= addresses if not off else not bodies & addresses


@pytest.mark.parametrize("when", ["open", "write"])
def test_a_file_system_without_it_gets_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Breaks when a merge onto such a disk fails, or loses what was refused."""
    numbers = direct_number(monkeypatch)
    counting = os.open

    def refused(path: Path, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return counting(path, flags, *rest)

    def put(number: int, data: memoryview, at: int) -> int:
        if number in numbers:
            raise OSError(errno.EINVAL, "Invalid argument")
        return PWRITE(number, data, at)

    if when == "open":
        monkeypatch.setattr(os, "open", refused)
    monkeypatch.setattr(os, "pwrite", put)
    file = written(tmp_path / "x", [100, PIECE + 7])
    entry = file.finish()
    file.close()
    assert (tmp_path / "x").read_bytes() == DATA and entry.sha256 == hashlib.sha256(DATA).hexdigest()


@pytest.mark.parametrize(("code", "kind"), [(errno.ENOSPC, DiskFullError), (errno.EIO, StorageError)])
def test_what_the_disk_refuses_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[Exception]
) -> None:
    """Breaks when a piece fails in its thread and nobody hears of it."""
    calls = []

    def put(number: int, data: memoryview, at: int) -> int:
        calls.append(at)
        if len(calls) == 2:
            raise OSError(code, os.strerror(code))
        return PWRITE(number, data, at)

    monkeypatch.setattr(os, "pwrite", put)
    file = LargeFile(tmp_path / "x", len(DATA))

    def whole() -> None:
        file.write(memoryview(DATA), 0)
        file.finish()

    with pytest.raises(kind, match=os.strerror(code)):
        whole()
    file.close()


def test_a_piece_that_the_disk_cuts_short_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when the rest of a short write is lost."""
    monkeypatch.setattr(os, "pwrite", lambda number, data, at: PWRITE(number, data[: max(1, len(data) // 2)], at))
    file = written(tmp_path / "x", [5])
    file.finish()
    file.close()
    assert (tmp_path / "x").read_bytes() == DATA


def test_a_page_that_was_lost_on_the_way_is_told_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when what a sync beside the writing has found out is forgotten: the system says it once."""
    calls = []

    def failing(number: int) -> None:
        calls.append(number)
        if len(calls) == 1:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(large_file, "_SYNC", 64)
    monkeypatch.setattr(large_file, "_FIRST", 64)
    monkeypatch.setattr(os, "fdatasync", failing)
    file = written(tmp_path / "x", [64, 128, 1024, 4096], order=[4, 3, 2, 1, 0])
    with pytest.raises(StorageError, match="Input/output error"):
        file.finish()
    file.close()
    assert len(calls) > 1


def test_bytes_that_were_never_written_are_in_the_digest_as_they_lie(tmp_path: Path) -> None:
    """Breaks when a file that is cut short behind our back keeps `finish` reading for ever."""
    file = LargeFile(tmp_path / "x", 10_000)
    file.write(memoryview(b"a" * 100), 50)
    os.truncate(tmp_path / "x", 5_000)
    with pytest.raises(StorageError, match="ends"):
        file.finish()
    file.close()
