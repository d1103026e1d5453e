"""The rows of one job: read from the parents' files or from what was kept of them, looked at, and merged.

Idea: whoever merges a tensor asks here for some rows of it, in any order and from any thread: the stream in blocks, the
proof and the gate as they have room. Rows that files hold as they are stay in the type of their file, and weighted sums
are taken of them where they lie; where rows are gathered, filled in, or an adapter adds to them, copies in float32 are.
What a first look reads can be kept, so that the files are read once. Numbers that are not finite are carried along
without a word of numpy's: whoever merges looks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import prod
from typing import Final, final

import numpy as np

from luthier.core.errors import NumericError, RecipeError
from luthier.data.strict_json import excerpt
from luthier.kernels.floats import FLOAT32, DType, narrowed, widened
from luthier.kernels.vectors import Moved, PlainVectors, Vectors
from luthier.maths.numbered_draws import key_of
from luthier.merge.measures import Measured, measured, of_rows
from luthier.merge.parents import Parent
from luthier.merge.plan import Job, Origin
from luthier.mergers import GRAM, Part, Rows, Sums, WeightedSum, no_base

TWIN: Final = PlainVectors()
Empty = Callable[[tuple[int, ...], DType], np.ndarray]
"""Makes arrays of a shape and a type, with any numbers."""


@final
class Source:
    """The rows of one job, from files or from what was kept of them. `vectors` does the sums of weighted sums, `empty`
    gives memory for rows as files hold them."""

    def __init__(self, parents: Sequence[Parent], job: Job, vectors: Vectors = TWIN, empty: Empty = np.empty) -> None:
        self.parents, self.job, self.vectors, self._empty = parents, job, vectors, empty
        self.kept: dict[int, np.ndarray] = {}
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

    @property
    def raw_bytes(self) -> int:
        """Bytes of the tensor in the files of all parents."""
        return sum(self.parents[each.parent].shards.slots[each.name].bytes for each in self.job.origins)

    def keep(self) -> None:
        """Keep what the first look reads, so that files are read once."""
        for number, origin in enumerate(self.job.origins):
            if origin.rows is None:
                slot = self.parents[origin.parent].shards.slots[origin.name]
                self.kept[number] = self._empty((slot.rows, slot.columns), slot.dtype)

    @np.errstate(all="ignore")
    def look(self, first: int, height: int, seen: Sequence[Sums]) -> Sums:
        """What the method has to know of some rows."""
        method = self.job.method
        if not seen:
            self._fill(first, height)
        if not isinstance(method, WeightedSum):
            return method.look(self.part(first, height), seen)
        rows, changes = self.rows(first, height), method.looks_at == "changes"
        if changes and self.job.base is None:
            raise no_base()
        if self.job.base is not None and not changes:
            rows = rows[:-1]
        return {GRAM: self.vectors.products(rows, based=changes)}

    @np.errstate(all="ignore")
    def merged(self, first: int, height: int, seen: Sequence[Sums]) -> Rows:
        """Some rows merged, in float32."""
        method = self.job.method
        if not isinstance(method, WeightedSum):
            return method.merge(self.part(first, height), seen)
        rows = self.rows(first, height)
        found = np.empty(rows[0].shape, FLOAT32)
        self._weighted(method, rows, seen, found)
        return found

    @np.errstate(all="ignore")
    def rounded(self, first: int, height: int, seen: Sequence[Sums], *, into: Rows) -> Measured:
        """Put some rows, merged and rounded once, into an array of the type of the result; their measures."""
        method = self.job.method
        if not isinstance(method, WeightedSum):
            part = self.part(first, height)
            found = method.merge(part, seen)
            into[...] = narrowed(found, into.dtype)
            return measured(part, found, seen)
        rows = self.rows(first, height)
        moved = self._weighted(method, rows, seen, into)
        return of_rows(rows, moved, seen, self.vectors, based=self.job.base is not None)

    def _weighted(
        self, method: WeightedSum, rows: Sequence[Rows], seen: Sequence[Sums], into: Rows
    ) -> Moved:
        shares = method.shares(self.job.weights, seen)
        if len(shares) > len(rows):
            raise no_base()
        weights = (*shares, *[0.0] * (len(rows) - len(shares)))
        return self.vectors.weighted(rows, weights, into=into, based=self.job.base is not None)

    def looks(
        self, firsts: range, height: int, done: Callable[[Sequence[Callable[[], Sums]]], Iterable[Sums]], *,
        seen: Sequence[Sums] = (),
    ) -> tuple[Sums, ...]:  # fmt: skip
        """All that the method has to know of a tensor in blocks; `done` does the work of a look. `seen` is known."""
        found = list(seen)
        while len(found) < self.job.method.passes:
            found.append(total(done(self.look_work(firsts, height, found))))
        return tuple(found)

    def look_work(self, firsts: range, height: int, seen: Sequence[Sums]) -> list[Callable[[], Sums]]:
        """One look, block by block: at least one, since a tensor without numbers has sums too."""
        return [partial(self.look, first, height, tuple(seen)) for first in firsts or [0]]

    def rows(self, first: int, height: int) -> list[Rows]:
        """Rows of all models and then of the base, in the type of their file where they are what it holds."""
        if not self._as_they_lie:
            part = self.part(first, height)
            return [*part.models, *([] if part.base is None else [part.base])]
        last = min(first + height, self.job.slot.rows)
        return [self._raw(number, first, last) for number in range(len(self.job.origins))]

    @np.errstate(all="ignore")
    def part(self, first: int, height: int) -> Part:
        """Rows of all models and the base; those that a vocabulary lacks are the mean of those that have them."""
        last = min(first + height, self.job.slot.rows)
        rows = [self._wide(number, first, last) for number in range(len(self.job.origins))]
        maps = [None if origin.rows is None else origin.rows[first:last] for origin in self.job.origins]
        if any(own is not None and (own < 0).any() for own in maps):
            there = [np.ones(last - first, bool) if own is None else own >= 0 for own in maps]
            count = np.sum(there, 0, dtype=np.float32).clip(min=1)
            mean = np.sum(rows, 0) / count[:, None]
            rows = [np.where(own[:, None], each, mean) for own, each in zip(there, rows, strict=True)]
        based = self.job.base is not None
        models, base = (tuple(rows[:-1]), rows[-1]) if based else (tuple(rows), None)
        columns = self.job.slot.columns
        return Part(models, base, self.job.weights, first * columns, prod(self.job.slot.shape), self.key)

    def _fill(self, first: int, height: int) -> None:
        """Read some rows into what is kept."""
        for number, kept in self.kept.items():
            origin, last = self.job.origins[number], min(first + height, len(kept))
            self.parents[origin.parent].shards.read(origin.name, first, last, out=kept[first:last])

    def _raw(self, number: int, first: int, last: int) -> np.ndarray:
        origin = self.job.origins[number]
        if number in self.kept:
            return self.kept[number][first:last]
        shards = self.parents[origin.parent].shards
        slot = shards.slots[origin.name]
        return shards.read(origin.name, first, last, out=self._empty((last - first, slot.columns), slot.dtype))

    def _wide(self, number: int, first: int, last: int) -> np.ndarray:
        origin = self.job.origins[number]
        parent = self.parents[origin.parent]
        if origin.rows is not None:
            return parent.gathered(origin.name, origin.rows[first:last])
        if number not in self.kept:
            return parent.rows(origin.name, first, last)
        kept = self.kept[number][first:last]
        # A float32 tensor that is kept must stay what it is.
        wide = kept.copy() if kept.dtype == FLOAT32 else widened(kept)
        if origin.name in parent.factors:
            parent.factors[origin.name].add_to(wide, first)
        return wide

    @np.errstate(all="ignore")
    def not_finite(self, first: int, height: int, seen: Sequence[Sums]) -> NumericError:
        """Which parent has numbers that are not finite, or that the result is too large for its type."""
        part = self.part(first, height)
        merged = self.job.method.merge(part, seen)
        every = part.models if part.base is None else (*part.models, part.base)
        for origin, rows in zip(self.job.origins, every, strict=True):
            if count := int((~np.isfinite(rows)).sum()):
                return NumericError(
                    f"{excerpt(origin.name)} of {self.parents[origin.parent].name} has {count} numbers that are not "
                    "finite; nothing was kept",
                    do="fetch or train that model again",
                )
        finite = merged[np.isfinite(merged)]
        largest = float(np.abs(finite).max()) if finite.size else float("inf")
        return NumericError(
            f"{excerpt(self.job.name)} has numbers up to {largest:.3g} when it is merged, too large for "
            f"{self.job.slot.dtype.name}; nothing was kept",
            do="write it in a wider type: --set dtype=bfloat16",
        )


def total(pieces: Iterable[Sums]) -> Sums:
    """The sums over all pieces of a tensor's rows, name by name."""
    whole: dict[str, np.ndarray] = {}
    for sums in pieces:
        whole = {name: whole[name] + each for name, each in sums.items()} if whole else dict(sums)
    return whole


def copied(parents: Sequence[Parent], job: Job) -> np.ndarray:
    """A tensor of whole numbers. Raises RecipeError where the parents do not have the same."""

    def read(origin: Origin) -> np.ndarray:
        return parents[origin.parent].shards.read(origin.name)

    found = read(job.models[0])
    for origin in job.origins[1:]:
        if not np.array_equal(read(origin), found):
            raise RecipeError(
                f"{excerpt(job.name)} holds whole numbers, which differ between "
                f"{parents[job.models[0].parent].name} and {parents[origin.parent].name}",
                allowed="the same in all models",
            )
    return found
