"""Stores: the pages of layers that see equally far back, one store for each window of a model.

Idea: layers with one window lose sight of a text's first pages at the same time, so they share a store: a page of it
has the keys of these layers alone, and each text has a table in it. What its window does not see any more is free there
while the text grows, and stays in the store of layers that see everything. A text may begin with what others have read
as far as all that its next token sees is there, in every store.
Source: Kwon et al., arXiv 2309.06180 (paged attention), with tables by window instead of one for all layers.
Cost: a table for each text and store; where all layers have one window, or none has, there is one store.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from luthier.infer.pages import Name, Pages, Table

Tables = list[Table]
"""Where the keys of a text lie, in each store."""


@final
class Stores:
    """For each of `windows` (None where all of a text is seen) as many pages of `size` tokens as `counts` says."""

    def __init__(self, windows: Sequence[int | None], counts: Sequence[int], size: int) -> None:
        self.size = size
        self.windows = tuple(windows)
        self.pages = tuple(Pages(count, size) for count in counts)

    def unseen(self, window: int | None, done: int) -> int:
        """How many of its first pages a text of which `done` places are read sees no more by such a window."""
        return 0 if window is None else max(0, done + 1 - window) // self.size

    def piece(self, length: int, left: int) -> int:
        """How much of a text may be read in a pass that has `left` places."""
        for window, pages in zip(self.windows, self.pages, strict=True):
            if window is not None and length > pages.count * self.size:
                # Longer than all room: in pieces that have some beside what they see.
                left = min(left, max(1, (pages.count - 1) * self.size - window + 2))
        return left

    def reach(self, tables: Tables) -> int:
        """Up to which place a text has pages."""
        return min(table.stop for table in tables) * self.size

    def grow(self, tables: Tables, stop: int) -> bool:
        """Give a text room up to a place; False where there is not enough, and what there was is given."""
        for table, pages in zip(tables, self.pages, strict=True):
            while table.stop * self.size < stop:
                page = pages.take()
                if page is None:
                    return False
                table.pages.append(page)
        return True

    def admit(self, tables: Tables, *, whole: int, piece: int) -> bool:
        """Room for all of a text, and where pages come free while it is read up to its next piece; else nothing."""
        stops = [whole if window is None else piece for window in self.windows]
        rows = list(zip(tables, stops, self.pages, strict=True))
        if any(-(-stop // self.size) - table.stop > pages.available for table, stop, pages in rows):
            return False
        for table, stop, pages in rows:
            short = -(-stop // self.size) - table.stop
            table.pages += [page for page in (pages.take() for _ in range(short)) if page is not None]
        return True

    def known(self, names: Sequence[Name]) -> int:
        """How many pages of these names, in their order, a text need not read: all it sees of so many is there."""
        fine = [True] * (len(names) + 1)
        for window, pages in zip(self.windows, self.pages, strict=True):
            there = 0
            for count, name in enumerate(names[: len(fine) - 1], 1):
                there = there + 1 if name in pages else 0
                if there >= count - self.unseen(window, count * self.size):
                    continue
                fine[count] = False
                if window is None:
                    # What is behind a gap is never seen whole.
                    del fine[count:]
                    break
        return max(count for count, each in enumerate(fine) if each)

    def find(self, names: Sequence[Name]) -> Tables:
        """The tables of one more text that begins with all of these pages, which are `known`."""
        tables = []
        for window, pages in zip(self.windows, self.pages, strict=True):
            seen = names[self.unseen(window, len(names) * self.size) :]
            found = [page for page in map(pages.find, seen) if page is not None]
            tables.append(Table(found, len(names) - len(found)))
        return tables

    def name(self, tables: Tables, at: int, name: Name) -> None:
        """A text's page `at` is full, and can be found by its name from now on."""
        for table, pages in zip(tables, self.pages, strict=True):
            pages.name(table.pages[at - table.passed], name)

    def pass_by(self, tables: Tables, done: int) -> None:
        """Let go what a text sees no more when `done` places of it are read."""
        for table, window, pages in zip(tables, self.windows, self.pages, strict=True):
            if (gone := self.unseen(window, done) - table.passed) > 0:
                pages.give_back(table.pages[:gone])
                table.pages, table.passed = table.pages[gone:], table.passed + gone

    def fork(self, tables: Tables, done: int) -> tuple[Tables, list[tuple[int, int]]] | None:
        """Tables of a twin that holds the same `done` places, and for each store the page to be copied and where to, if
        the last one is not full; None where a store has no page for it."""
        whole, rest = divmod(done, self.size)
        if rest and not all(pages.available for pages in self.pages):
            return None
        twins, copies = [], []
        for table, pages in zip(tables, self.pages, strict=True):
            count = whole - table.passed
            twin = Table(table.pages[:count], table.passed)
            for each in twin.pages:
                pages.hold(each)
            page = pages.take() if rest else None
            if page is not None:
                copies.append((table.pages[count], page))
                twin.pages.append(page)
            twins.append(twin)
        return twins, copies

    def give_back(self, tables: Tables) -> None:
        """A text holds nothing any more."""
        for table, pages in zip(tables, self.pages, strict=True):
            pages.give_back(table.pages)

    def forget(self) -> None:
        """No page can be found any more; what is held stays held."""
        for pages in self.pages:
            pages.forget()
