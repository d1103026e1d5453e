"""Sources: where the trees of each optimizer step come from.

A source is asked for step after step and says where it stands as plain numbers, so that a resumed run goes on with
exactly the rows an unbroken one would have seen. The loop does not know whether rows lie in a file or were just rolled
out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, final

import numpy as np
from numpy.typing import NDArray

from luthier.core.errors import CorruptError, DataError
from luthier.core.events import Event
from luthier.data.forest import Tree
from luthier.data.rendering.rendered import Rendered
from luthier.objectives import Objective
from luthier.train.pass_report import PassReport

FULL: Final = 0.99
"""A micro-batch as full as this is not worth a search through a million rows for a fuller one."""


class Rows(Protocol):
    """Rendered rows by index: a list, or a store on disk."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: int, /) -> Rendered:
        """One of them."""


@dataclass(frozen=True)
class Cursor:
    """Where a source stands: the epoch and how many rows of its order are used."""

    epoch: int = 0
    used: int = 0


@dataclass(frozen=True)
class MicroBatch:
    """Rows (by their index in the source) that would go through the model together, and their lengths."""

    indices: tuple[int, ...]
    tokens: int
    longest: int


class Source(ABC):
    """Yields the trees of one optimizer step at a time."""

    @abstractmethod
    def next_step(self) -> list[Tree]:
        """The trees of the next step; never empty."""

    @property
    @abstractmethod
    def cursor(self) -> Cursor:
        """Where the source stands, to be saved."""

    @abstractmethod
    def seek(self, cursor: Cursor) -> None:
        """Go on from a saved place."""

    def expect(self, steps: int) -> None:  # noqa: B027 (most sources end by themselves)
        """How many steps will be asked for in all, from the first one of the run."""

    def held(self) -> Mapping[str, NDArray[Any]]:
        """What has to be saved beside the cursor to go on from here: arrays by name; none where the cursor says all."""
        return {}

    def hold(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take back what `held` gave."""
        if arrays:
            raise CorruptError(
                f"the checkpoint holds {', '.join(sorted(arrays)[:3])} of its source",
                allowed="nothing but a cursor, as rows of a data set have it",
            )

    def told(self, passed: PassReport) -> list[Event]:
        """What is to be recorded of the trees of the last step, now that their pass is done."""
        return []


@final
class DataSource(Source):
    """Rows of a data set, in an order that is a pure function of (seed, epoch).

    A step takes `rows` rows, or rows until `tokens` tokens are reached; it never crosses the end of an epoch. Trees of
    rows are those of the objective, unless they were `made` before, by the number of the row.
    """

    def __init__(
        self,
        views: Rows,
        objective: Objective,
        *,
        lengths: NDArray[np.int64],
        seed: int,
        rows: int | None = None,
        tokens: int | None = None,
        made: Mapping[int, Tree] | None = None,
    ) -> None:
        if len(views) == 0:
            raise DataError("there is no row to train on", do="look at the counts of: luthier data check")
        if (rows is None) == (tokens is None):
            raise DataError("a step is measured in rows or in tokens", allowed="exactly one of the two")
        self.views = views
        self.objective = objective
        self._made = made or {}
        self.lengths = lengths
        self.seed = seed
        self.rows = rows
        self.tokens = tokens
        self.note: Callable[[int, list[Tree]], list[Tree]] | None = None
        """What is noted on the trees of a row, by its index, as they come."""
        self._cursor = Cursor()
        self._order = self._epoch_order(0)

    def next_step(self) -> list[Tree]:
        if self._cursor.used >= len(self._order):
            self.seek(Cursor(self._cursor.epoch + 1, 0))
        start = self._cursor.used
        stop = self._step_end(self._order, start)
        self._cursor = Cursor(self._cursor.epoch, stop)
        epoch = self._cursor.epoch
        found = []
        for index in self._order[start:stop].tolist():
            trees = self._trees(self.views[index], epoch)
            found += trees if self.note is None else self.note(index, trees)
        return found

    @property
    def cursor(self) -> Cursor:
        return self._cursor

    def seek(self, cursor: Cursor) -> None:
        if cursor.epoch != self._cursor.epoch:
            self._order = self._epoch_order(cursor.epoch)
        self._cursor = cursor

    def steps_in(self, epochs: float) -> int:
        """How many optimizer steps `epochs` passes over the data make (a fraction ends within the last one)."""
        whole, part = int(epochs), epochs - int(epochs)
        count = sum(len(list(self._bounds(epoch))) for epoch in range(whole))
        if part:
            rows = part * len(self.lengths)
            count += sum(1 for start, _ in self._bounds(whole) if start < rows)
        return count

    def largest_step(self) -> int:
        """Tokens of the largest step that can come: of its longest rows together, or of a budget of tokens."""
        if self.rows is not None:
            return int(np.sort(self.lengths)[-self.rows :].sum())
        return max(self.tokens or 0, int(self.lengths.max()))

    def largest_micro_batches(self, micro_tokens: int, steps: int) -> tuple[MicroBatch, ...]:
        """The micro-batch with the most tokens in `steps` steps, and the one with the longest row when it is another.

        From lengths alone; no row is read. The search ends early once there can be none that is larger by a hundredth.
        """
        longest_row = int(self.lengths.max())
        enough = max(FULL * micro_tokens, longest_row)
        fullest = longest = MicroBatch((), 0, 0)
        for step in self._steps(steps):
            batches = self._micro_batches(step, micro_tokens)
            fullest = max(fullest, *batches, key=lambda batch: (batch.tokens, batch.longest))
            longest = max(longest, *batches, key=lambda batch: (batch.longest, batch.tokens))
            if fullest.tokens >= enough and longest.longest == longest_row:
                break
        return (fullest,) if fullest.longest == longest.longest else (fullest, longest)

    def first_rows(self, count: int) -> Iterator[list[Tree]]:
        """The trees of each of the first `count` rows of a run, wherever the source stands."""
        for index in self._epoch_order(0)[:count]:
            yield self._trees(self.views[int(index)])

    def trees_of(self, batch: MicroBatch) -> list[Tree]:
        """The trees of the rows of a micro-batch."""
        return [tree for index in batch.indices for tree in self._trees(self.views[index])]

    def _trees(self, view: Rendered, epoch: int = 0) -> list[Tree]:
        made = self._made.get(view.row)
        return self.objective.trees(view, epoch=epoch) if made is None else [made]

    def _steps(self, count: int) -> Iterator[NDArray[np.int64]]:
        """The rows of the first `count` steps of a run."""
        epoch = 0
        while True:
            order = self._epoch_order(epoch)
            for start, stop in self._bounds(epoch):
                if count == 0:
                    return
                yield order[start:stop]
                count -= 1
            epoch += 1

    def _micro_batches(self, step: NDArray[np.int64], micro_tokens: int) -> list[MicroBatch]:
        """A step as the stepper cuts it: longest rows first, each filled until the next row does not fit."""
        order = step[np.argsort(-self.lengths[step], kind="stable")]
        sizes = self.lengths[order]
        ends = np.cumsum(sizes)
        batches, start, before = [], 0, 0
        while start < len(order):
            stop = max(start + 1, int(np.searchsorted(ends, before + micro_tokens, side="right")))
            tokens = int(ends[stop - 1]) - before
            batches.append(MicroBatch(tuple(order[start:stop].tolist()), tokens, int(sizes[start])))
            start, before = stop, int(ends[stop - 1])
        return batches

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.lengths))

    def _bounds(self, epoch: int) -> Iterator[tuple[int, int]]:
        order = self._epoch_order(epoch)
        start = 0
        while start < len(order):
            stop = self._step_end(order, start)
            yield start, stop
            start = stop

    def _step_end(self, order: NDArray[np.int64], start: int) -> int:
        if self.rows is not None:
            return min(start + self.rows, len(order))
        total = 0
        for stop in range(start, len(order)):
            total += int(self.lengths[order[stop]])
            # The row that would overflow the budget waits for the next step, unless the step were empty without it.
            if self.tokens is not None and total > self.tokens and stop > start:
                return stop
        return len(order)
