"""The stream: rows come from all parents, are merged in float32, rounded once, and go into the new files.

Idea: one tensor after another in the order of the files, cut into blocks of rows that a processor's caches can hold.
Workers read and compute blocks; blocks come back in order, and one more thread writes them and takes their digest. A
method that looks first has its looks over all blocks of a tensor before the first is merged: others do that, ahead of
those that merge, so that nobody waits between two tensors; what they read is kept where memory has room for it, and
read once. So the most that is held is known: blocks at work, blocks that wait to be written, and what is kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import isfinite, prod
from types import TracebackType
from typing import Final, TypeVar, final

import numpy as np

from luthier.core.errors import RecipeError
from luthier.core.units import bytes_text
from luthier.kernels.blas_threads import one_blas_thread
from luthier.kernels.floats import FLOAT16, widened
from luthier.kernels.vectors import vectors_for
from luthier.kernels.wanted import wanted_kernels
from luthier.merge.buffers import Buffers
from luthier.merge.measures import Measured, TensorReport
from luthier.merge.parents import Parent
from luthier.merge.plan import Job, Plan
from luthier.merge.source import Source, copied, total
from luthier.mergers import Rows, Sums, WeightedSum
from luthier.model.files.shards import ShardWriter
from luthier.store.large_file import HELD

BLOCK: Final = 1 << 18
"""Numbers of a block at most: a megabyte in float32, so that what is done to it finds it in a cache."""
LEAN_BLOCK: Final = 1 << 20
"""The same where nothing is copied: as few pieces as threads can share out well."""
COPIES: Final = 8
"""Float32 copies of a block that a method makes for each model, beside those that it is given."""
COUNTS: Final = 1 << 20
"""Bytes of what a method that is no weighted sum has seen of a tensor, at most, for each model."""
HEAP: Final = 1 << 24
"""Bytes that threads' heaps may keep for the next block, about."""
WAITING: Final = 4
"""Blocks that wait to be written, at most."""
AHEAD: Final = 1 << 25
"""Bytes of tensors that are kept at once at most, where one does not have more."""
MOST_AHEAD: Final = 64
"""Tensors that are looked at before they are merged, at most."""
Found = TypeVar("Found")


@final
@dataclass(frozen=True)
class Room:
    """How much memory a merge may hold beside the program itself, and how it is shared out."""

    memory_bytes: int
    threads: int

    def block(self, models: int, columns: int, *, lean: bool = False) -> int:
        """Rows of a block; `lean` where no copies are made. Raises RecipeError where not one row fits."""
        each = 4 * columns * (models + 1 if lean else models * COPIES + 2)
        # Twice as many threads: half of them look ahead. What is on its way to the disk is the result alone.
        needed = (2 * self.threads + WAITING) * each + HELD * 4 * columns
        rows = int(self.memory_bytes // 2 // needed)
        if not rows:
            raise RecipeError(
                f"memory is {bytes_text(self.memory_bytes)}, and a row of {columns:,} numbers of {models} models needs "
                f"{bytes_text(2 * needed)}",
                do="give it more: --set memory_gb=2",
            )
        return max(1, min(rows, (LEAN_BLOCK if lean else BLOCK) // max(columns, 1)))

    def holds(self, models: int, numbers: int) -> bool:
        """Whether a tensor of so many numbers may be merged in one piece."""
        return 4 * numbers * (models * COPIES + 2) <= self.memory_bytes // 2

    @property
    def kept_bytes(self) -> int:
        """The most that a tensor of all parents may have to be kept from its first look on."""
        return self.memory_bytes // 4


def stream(
    parents: Sequence[Parent], plan: Plan, writer: ShardWriter, room: Room, *,
    told: Callable[[int], None] = lambda _bytes: None,
) -> list[TensorReport]:  # fmt: skip
    """Merge all tensors of a plan into `writer`; what is told of each. `told` hears of the bytes that were written.

    Raises NumericError for a tensor that is not finite.
    """
    reports, vectors = [], vectors_for(wanted_kernels())
    buffers = Buffers(min(AHEAD, room.kept_bytes))
    # The C library gives what a block leaves back to the system and takes it anew for the next one, a fault and a page
    # of zeros each time, until it has seen a piece of such a size go: nearly half of what ties costs a processor.
    np.empty(HEAP, np.uint8)
    with (
        one_blas_thread(),
        _Lookers(room.threads) as lookers,
        ThreadPoolExecutor(room.threads, "merge") as workers,
        _Out(writer, buffers, told) as out,
    ):
        jobs = {job.name: job for job in plan.jobs}
        sources = (Source(parents, jobs[name], vectors, buffers.empty) for name in writer.order)
        for work in _ahead(sources, room, lookers):
            job = work.source.job
            if job.copied:
                out.write(job.name, copied(parents, job), 0)
            else:
                reports.append(_merged(work, room, workers, out))
        out.finish()
    return reports


@final
class _Out:
    """Where rows of the result go: memory that they are merged into, and a thread that writes them in order."""

    def __init__(self, writer: ShardWriter, buffers: Buffers, told: Callable[[int], None]) -> None:
        self._writer, self._buffers, self._told = writer, buffers, told
        self._thread = ThreadPoolExecutor(1, "write")
        self._waiting: deque[Future[None]] = deque()

    def empty(self, job: Job, first: int, height: int) -> Rows:
        """Memory for rows from `first` on, so placed that the disk takes them from where they lie."""
        rows = min(height, job.slot.rows - first)
        return self._buffers.empty((rows, job.slot.columns), job.slot.dtype, at=self._writer.offset(job.name, first))

    def write(self, name: str, rows: Rows, first: int) -> None:
        """Hand rows over. Waits where as many as may wait do."""
        while len(self._waiting) >= WAITING:
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(self._writer.write, name, rows, first))
        self._told(rows.nbytes)

    def finish(self) -> None:
        """Wait until all rows are handed over. Raises what writing them raised."""
        for future in self._waiting:
            future.result()

    def __enter__(self) -> _Out:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()


@final
class _Lookers:
    """Threads that look at blocks, and one that asks them for the first look at one tensor after another."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._each, self._ahead = ThreadPoolExecutor(threads, "look"), ThreadPoolExecutor(1, "ahead")

    def begin(self, work: Sequence[Callable[[], Sums]]) -> Future[Sums]:
        """One look, some time after those that were begun before it."""
        return self._ahead.submit(lambda: total(self.done(work)))

    def done(self, work: Sequence[Callable[[], Sums]]) -> Iterator[Sums]:
        """What was seen of each block, in order, so that their sums are the same each time."""
        return _in_order(self._each, self._threads, work)

    def __enter__(self) -> _Lookers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ahead.shutdown(cancel_futures=True)
        self._each.shutdown()


@final
class _Work:
    """A tensor in blocks, whose first look has begun. `held` are the bytes that it takes until it is merged."""

    def __init__(self, source: Source, room: Room, lookers: _Lookers) -> None:
        self.source, self.held, job = source, _held_bytes(source, room), source.job
        if job.copied:
            return
        self._lookers = lookers
        self.height = room.block(len(job.origins), job.slot.columns, lean=source.lean)
        self.firsts = range(0, job.slot.rows, self.height)
        if _kept_bytes(source, room):
            source.keep()
        looks = source.look_work(self.firsts, self.height, ())
        self._begun = [lookers.begin(looks)] if job.method.passes else []

    def seen(self) -> tuple[Sums, ...]:
        """All looks, once they have come to an end."""
        first = [look.result() for look in self._begun]
        return self.source.looks(self.firsts, self.height, self._lookers.done, seen=first)


def _ahead(sources: Iterable[Source], room: Room, lookers: _Lookers) -> Iterator[_Work]:
    """One tensor after another, when those behind it have begun: as many as may be kept at once."""
    begun: deque[_Work] = deque()
    held, most = 0, min(AHEAD, room.kept_bytes)
    for source in sources:
        more = _held_bytes(source, room)
        # What is merged now is held until the next one is asked for.
        while begun and (held + more > most or len(begun) > MOST_AHEAD):
            yield begun[0]
            held -= begun.popleft().held
        begun.append(_Work(source, room, lookers))
        held += more
    yield from begun


def _held_bytes(source: Source, room: Room) -> int:
    """What is held of a tensor from its first look on: what is kept of it, and what was seen."""
    job = source.job
    seen = 0 if job.copied or isinstance(job.method, WeightedSum) or not job.method.passes else COUNTS * len(job.models)
    return _kept_bytes(source, room) + seen


def _kept_bytes(source: Source, room: Room) -> int:
    """What is kept of a tensor from its first look on: all of it, or nothing."""
    job = source.job
    keeps = not job.copied and job.method.passes and source.raw_bytes <= room.kept_bytes
    return source.raw_bytes if keeps else 0


def _merged(
    work: _Work, room: Room, workers: ThreadPoolExecutor, out: _Out
) -> TensorReport:
    """All looks at one tensor, then its blocks."""
    source, job = work.source, work.source.job
    seen, whole = work.seen(), Measured(0.0, 0.0, 0.0, None)
    blocks = [partial(_block, source, first, work.height, seen, out) for first in work.firsts]
    for first, (rows, found) in zip(work.firsts, _in_order(workers, room.threads, blocks), strict=True):
        whole = found if first == 0 else whole + found
        out.write(job.name, rows, first)
    # Whoever asked for it may hold it until the next one is there.
    source.kept.clear()
    return TensorReport.of(job.name, whole, seen, job.method.told(job.weights, seen), numbers=prod(job.slot.shape),
                           based=job.base is not None)  # fmt: skip


def _block(source: Source, first: int, height: int, seen: Sequence[Sums], out: _Out) -> tuple[Rows, Measured]:
    rounded = out.empty(source.job, first, height)
    found = source.rounded(first, height, seen, into=rounded)
    # A sum that is not finite may be one that is too large for float32; only then every number is looked at.
    narrow = rounded.dtype == FLOAT16
    if (narrow or not isfinite(found.moved + found.whole)) and not np.isfinite(widened(rounded)).all():
        raise source.not_finite(first, height, seen)
    return rounded, found


def _in_order(workers: ThreadPoolExecutor, threads: int, work: Sequence[Callable[[], Found]]) -> Iterator[Found]:
    """The results of all work in its order, while no more than a few pieces of it are begun."""
    begun: deque[Future[Found]] = deque()
    try:
        for piece in work:
            if len(begun) > threads:
                yield begun.popleft().result()
            begun.append(workers.submit(piece))
        while begun:
            yield begun.popleft().result()
    finally:
        for future in begun:
            future.cancel()
