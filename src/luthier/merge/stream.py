"""The stream: rows come from all parents, are merged in float32, rounded once, and go into the new files.

Idea: one tensor after another in the order of the files, cut into blocks of rows that a processor's caches can hold.
Workers read and compute blocks; blocks come back in order, and one more thread writes them and takes their digest. A
method that looks first has its looks over all blocks of a tensor before the first is merged; where a tensor of all
parents fits into the memory that is left, it is read once for all of that. So the most that is held is known: blocks at
work, blocks that wait to be written, and one tensor that is kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Final, TypeVar, final

import torch
from torch import Tensor

from luthier.core.errors import NumericError, RecipeError
from luthier.core.units import bytes_text
from luthier.data.strict_json import excerpt
from luthier.kernels.vectors import Moved, TorchVectors, Vectors, vectors_for
from luthier.kernels.wanted import wanted_kernels
from luthier.maths.numbered_draws import key_of
from luthier.merge.measures import Measured, TensorReport, measured, of_rows
from luthier.merge.parents import Parent
from luthier.merge.plan import Job, Origin, Plan
from luthier.mergers import GRAM, Part, Rows, Sums, WeightedSum, no_base
from luthier.model.files.shards import ShardWriter

BLOCK: Final = 1 << 18
"""Numbers of a block at most: a megabyte in float32, so that what is done to it finds it in a cache."""
LEAN_BLOCK: Final = 1 << 20
"""The same where nothing is copied: as few pieces as threads can share out well."""
COPIES: Final = 8
"""Float32 copies of a block that a method makes for each model, beside those that it is given."""
WAITING: Final = 4
"""Blocks that wait to be written, at most."""
TWIN: Final = TorchVectors()
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
        rows = int(self.memory_bytes // 2 // ((self.threads + WAITING) * each))
        if not rows:
            raise RecipeError(
                f"memory is {bytes_text(self.memory_bytes)}, and a row of {columns:,} numbers of {models} models needs "
                f"{bytes_text(2 * (self.threads + WAITING) * each)}",
                do="give it more: --set memory_gb=2",
            )
        return max(1, min(rows, (LEAN_BLOCK if lean else BLOCK) // max(columns, 1)))

    def holds(self, models: int, numbers: int) -> bool:
        """Whether a tensor of so many numbers may be merged in one piece."""
        return 4 * numbers * (models * COPIES + 2) <= self.memory_bytes // 2

    def keeps(self, raw_bytes: int) -> bool:
        """Whether a tensor of all parents may be kept between two looks."""
        return raw_bytes <= self.memory_bytes // 4


@torch.no_grad()
def stream(
    parents: Sequence[Parent], plan: Plan, writer: ShardWriter, room: Room, *,
    told: Callable[[int], None] = lambda _bytes: None,
) -> list[TensorReport]:  # fmt: skip
    """Merge all tensors of a plan into `writer`; what is told of each. `told` hears of the bytes that were written.

    Raises NumericError for a tensor that is not finite.
    """
    reports, vectors = [], vectors_for(wanted_kernels())
    with (
        one_thread_each(),
        ThreadPoolExecutor(room.threads, "merge") as workers,
        ThreadPoolExecutor(1, "write") as writing,
    ):
        waiting: deque[Future[None]] = deque()

        def write(name: str, rows: Tensor, first: int) -> None:
            while len(waiting) >= WAITING:
                waiting.popleft().result()
            waiting.append(writing.submit(writer.write, name, rows, first))
            told(rows.numel() * rows.element_size())

        jobs = {job.name: job for job in plan.jobs}
        for job in (jobs[name] for name in writer.order):
            if job.copied:
                write(job.name, copied(parents, job), 0)
            else:
                reports.append(_merged(parents, job, vectors, room, workers, write))
        for future in waiting:
            future.result()
    return reports


def _merged(
    parents: Sequence[Parent], job: Job, vectors: Vectors, room: Room, workers: ThreadPoolExecutor,
    write: Callable[[str, Tensor, int], None],
) -> TensorReport:  # fmt: skip
    """All looks at one tensor, then its blocks."""
    slot = job.slot
    source = Source(parents, job, vectors)
    height = room.block(len(job.origins), slot.columns, lean=source.lean)
    firsts = range(0, slot.rows, height)
    raw = sum(parents[origin.parent].shards.slots[origin.name].bytes for origin in job.origins)
    if job.method.passes and len(firsts) > 1 and room.keeps(raw):
        keeping = [partial(source.keep, number) for number in range(len(job.origins))]
        list(_in_order(workers, room.threads, keeping))
    seen = source.looks(firsts, height, partial(_in_order, workers, room.threads))
    whole = Measured(0.0, 0.0, 0.0, None)
    blocks = [partial(_block, source, first, height, tuple(seen)) for first in firsts]
    for first, (rows, found) in zip(firsts, _in_order(workers, room.threads, blocks), strict=True):
        whole = found if first == 0 else whole + found
        write(job.name, rows, first)
    return TensorReport.of(job.name, whole, seen, job.method.told(job.weights, seen), numbers=prod(slot.shape),
                           based=job.base is not None)  # fmt: skip


def _block(source: Source, first: int, height: int, seen: Sequence[Sums]) -> tuple[Rows, Measured]:
    rounded, found = source.rounded(first, height, seen)
    # A sum that is not finite may be one that is too large for float32; only then every number is looked at.
    narrow = rounded.dtype == torch.float16
    if (narrow or found.moved - found.moved or found.whole - found.whole) and not bool(rounded.isfinite().all()):
        raise source.not_finite(first, height, seen)
    return rounded, found


@final
class Source:
    """The rows of one job, from files or from what was kept of them. `vectors` does the sums of weighted sums."""

    def __init__(self, parents: Sequence[Parent], job: Job, vectors: Vectors = TWIN) -> None:
        self.parents, self.job, self.vectors = parents, job, vectors
        self.kept: dict[int, Tensor] = {}
        self.key = key_of(job.name)

    @property
    def lean(self) -> bool:
        """Whether rows are merged where they lie, without copies in float32."""
        return isinstance(self.job.method, WeightedSum) and self.vectors.in_place and self._as_they_lie

    @property
    def _as_they_lie(self) -> bool:
        """Whether files hold the rows that are merged: none are gathered or filled in, no adapter is added."""
        return not any(
            each.rows is not None or each.name in self.parents[each.parent].factors for each in self.job.origins
        )

    def keep(self, number: int) -> None:
        origin = self.job.origins[number]
        if origin.rows is None:
            slot = self.parents[origin.parent].shards.slots[origin.name]
            self.kept[number] = self.parents[origin.parent].shards.read(origin.name, 0, slot.rows)

    def look(self, first: int, height: int, seen: Sequence[Sums]) -> Sums:
        """What the method has to know of some rows."""
        method = self.job.method
        if not isinstance(method, WeightedSum):
            return method.look(self.part(first, height), seen)
        rows, changes = self.rows(first, height), method.looks_at == "changes"
        if changes and self.job.base is None:
            raise no_base()
        if self.job.base is not None and not changes:
            rows = rows[:-1]
        return {GRAM: self.vectors.products(rows, based=changes)}

    def merged(self, first: int, height: int, seen: Sequence[Sums]) -> Rows:
        """Some rows merged, in float32."""
        method = self.job.method
        if not isinstance(method, WeightedSum):
            return method.merge(self.part(first, height), seen)
        return self._weighted(method, self.rows(first, height), seen, torch.float32)[0]

    def rounded(self, first: int, height: int, seen: Sequence[Sums]) -> tuple[Rows, Measured]:
        """Some rows merged and rounded once, and their measures."""
        method, dtype = self.job.method, self.job.slot.dtype
        if not isinstance(method, WeightedSum):
            part = self.part(first, height)
            found = method.merge(part, seen)
            return found.to(dtype), measured(part, found, seen)
        rows = self.rows(first, height)
        narrow, moved = self._weighted(method, rows, seen, dtype)
        return narrow, of_rows(rows, moved, seen, self.vectors, based=self.job.base is not None)

    def _weighted(
        self, method: WeightedSum, rows: Sequence[Rows], seen: Sequence[Sums], dtype: torch.dtype
    ) -> tuple[Rows, Moved]:
        shares = method.shares(self.job.weights, seen)
        if len(shares) > len(rows):
            raise no_base()
        weights = (*shares, *[0.0] * (len(rows) - len(shares)))
        return self.vectors.weighted(rows, weights, dtype=dtype, based=self.job.base is not None)

    def looks(
        self, firsts: range, height: int, done: Callable[[Sequence[Callable[[], Sums]]], Iterable[Sums]]
    ) -> list[Sums]:
        """All that the method has to know of a tensor in blocks; `done` does the work of a look."""
        seen: list[Sums] = []
        for _ in range(self.job.method.passes):
            total: Sums | None = None
            for sums in done([partial(self.look, first, height, tuple(seen)) for first in firsts or [0]]):
                total = added(total, sums)
            seen.append(total or {})
        return seen

    def rows(self, first: int, height: int) -> list[Rows]:
        """Rows of all models and then of the base, in the type of their file where they are what it holds."""
        if not self._as_they_lie:
            part = self.part(first, height)
            return [*part.models, *([] if part.base is None else [part.base])]
        last = min(first + height, self.job.slot.rows)
        return [self._raw(number, first, last) for number in range(len(self.job.origins))]

    def part(self, first: int, height: int) -> Part:
        """Rows of all models and the base; those that a vocabulary lacks are the mean of those that have them."""
        last = min(first + height, self.job.slot.rows)
        rows = [self._wide(number, first, last) for number in range(len(self.job.origins))]
        maps = [None if origin.rows is None else origin.rows[first:last] for origin in self.job.origins]
        if any(own is not None and bool((own < 0).any()) for own in maps):
            there = [torch.ones(last - first, dtype=torch.bool) if own is None else own >= 0 for own in maps]
            count = torch.stack(there).sum(0).clamp(min=1)
            mean = torch.stack(rows).sum(0) / count[:, None]
            rows = [torch.where(own[:, None], each, mean) for own, each in zip(there, rows, strict=True)]
        based = self.job.base is not None
        models, base = (tuple(rows[:-1]), rows[-1]) if based else (tuple(rows), None)
        columns = self.job.slot.columns
        return Part(models, base, self.job.weights, first * columns, prod(self.job.slot.shape), self.key)

    def _raw(self, number: int, first: int, last: int) -> Tensor:
        origin = self.job.origins[number]
        if number in self.kept:
            return self.kept[number][first:last]
        return self.parents[origin.parent].shards.read(origin.name, first, last)

    def _wide(self, number: int, first: int, last: int) -> Tensor:
        origin = self.job.origins[number]
        parent = self.parents[origin.parent]
        if origin.rows is not None:
            return parent.gathered(origin.name, origin.rows[first:last])
        if number not in self.kept:
            return parent.rows(origin.name, first, last)
        wide = self.kept[number][first:last].float()
        # A float32 tensor that is kept must stay what it is.
        wide = wide.clone() if wide.data_ptr() == self.kept[number][first:last].data_ptr() else wide
        if origin.name in parent.factors:
            parent.factors[origin.name].add_to(wide, first)
        return wide

    def not_finite(self, first: int, height: int, seen: Sequence[Sums]) -> NumericError:
        """Which parent has numbers that are not finite, or that the result is too large for its type."""
        part = self.part(first, height)
        merged = self.job.method.merge(part, seen)
        every = part.models if part.base is None else (*part.models, part.base)
        for origin, rows in zip(self.job.origins, every, strict=True):
            if count := int((~rows.isfinite()).sum()):
                return NumericError(
                    f"{excerpt(origin.name)} of {self.parents[origin.parent].name} has {count} numbers that are not "
                    "finite; nothing was kept",
                    do="fetch or train that model again",
                )
        largest = float(merged[merged.isfinite()].abs().max()) if bool(merged.isfinite().any()) else float("inf")
        return NumericError(
            f"{excerpt(self.job.name)} has numbers up to {largest:.3g} when it is merged, too large for "
            f"{str(self.job.slot.dtype).removeprefix('torch.')}; nothing was kept",
            do="write it in a wider type: --set dtype=bfloat16",
        )


def added(one: Sums | None, other: Sums) -> Sums:
    """The sums over two pieces of rows."""
    return other if one is None else {name: one[name] + tensor for name, tensor in other.items()}


def copied(parents: Sequence[Parent], job: Job) -> Tensor:
    """A tensor of whole numbers. Raises RecipeError where the parents do not have the same."""

    def read(origin: Origin) -> Tensor:
        return parents[origin.parent].shards.read(origin.name)

    found = read(job.models[0])
    for origin in job.origins[1:]:
        if not torch.equal(read(origin), found):
            raise RecipeError(
                f"{excerpt(job.name)} holds whole numbers, which differ between "
                f"{parents[job.models[0].parent].name} and {parents[origin.parent].name}",
                allowed="the same in all models",
            )
    return found


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


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Blocks are shared out to workers; inside one, more threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
