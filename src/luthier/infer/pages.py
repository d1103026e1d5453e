"""Pages: who holds which part of the cache, and what is still there to begin a new text with.

Idea: the keys of a text lie in pages of a few tokens, anywhere. A full page is known by all that its keys depend on:
the adapter, and every token up to its last one. A text that begins with the same tokens under the same adapter
holds the same pages; the forest grows at its leaves and its trunks are there once. A page that nobody holds keeps what
it has until somebody needs the room; the one that was left longest ago goes first.
Source: Kwon et al., arXiv 2309.06180 (paged attention), sections 4.1 to 4.4.
Cost: one digest for each full page of a prompt.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import final

import numpy as np

from luthier.data.forest import Ints

Name = bytes
"""What a full page holds: a digest of the adapter and of all tokens up to its last one."""


@final
@dataclass
class Table:
    """The pages of a text in their order, without the first `passed` ones, which nothing of it sees any more."""

    pages: list[int] = field(default_factory=list)
    passed: int = 0

    @property
    def stop(self) -> int:
        """Behind which page it ends."""
        return self.passed + len(self.pages)


@final
class Pages:
    """`count` pages of `size` tokens. Holders are counted, not known."""

    def __init__(self, count: int, size: int) -> None:
        self.count = count
        self.size = size
        # Taken from the end: low numbers first, so that memory is touched only as far as it is needed.
        self._free = list(range(count - 1, -1, -1))
        self._holders: dict[int, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._names: dict[int, Name] = {}
        self._pages: dict[Name, int] = {}

    @property
    def available(self) -> int:
        """How many pages can be taken."""
        return len(self._free) + len(self._kept)

    @property
    def held(self) -> int:
        """How many pages somebody holds."""
        return len(self._holders)

    @property
    def kept(self) -> int:
        """How many pages nobody holds that still have a name."""
        return len(self._kept)

    def take(self) -> int | None:
        """An empty page for one holder; None when every page is held."""
        if self._free:
            page = self._free.pop()
        elif self._kept:
            page, _ = self._kept.popitem(last=False)
            self._forget(page)
        else:
            return None
        self._holders[page] = 1
        return page

    def __contains__(self, name: Name) -> bool:
        """Whether there is a page of this name."""
        return name in self._pages

    def find(self, name: Name) -> int | None:
        """The page of this name, for one more holder; None when there is none."""
        page = self._pages.get(name)
        if page is not None:
            self.hold(page)
        return page

    def hold(self, page: int) -> None:
        """One more holder of a page."""
        self._kept.pop(page, None)
        self._holders[page] = self._holders.get(page, 0) + 1

    def give_back(self, pages: Sequence[int]) -> None:
        """One holder less of each; what is named stays findable, the last pages of a text being the first to go."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            del self._holders[page]
            if page in self._names:
                self._kept[page] = None
            else:
                self._free.append(page)

    def holders(self, page: int) -> int:
        """How many hold it."""
        return self._holders.get(page, 0)

    def name(self, page: int, name: Name) -> None:
        """A page is full, and can be found by its name from now on. The first of several with one name is found."""
        if name not in self._pages and page not in self._names:
            self._pages[name] = page
            self._names[page] = name

    def forget(self) -> None:
        """No page can be found any more; what is held stays held."""
        self._pages.clear()
        self._names.clear()
        self._free.extend(self._kept)
        self._kept.clear()

    def _forget(self, page: int) -> None:
        del self._pages[self._names.pop(page)]


def first_name(adapter: Hashable) -> Name:
    """What names under an adapter begin with."""
    return hashlib.blake2b(repr(adapter).encode(), digest_size=16).digest()


def next_name(before: Name, tokens: Ints) -> Name:
    """The name of a page with these tokens behind another."""
    return hashlib.blake2b(before + np.ascontiguousarray(tokens, dtype="<i4").tobytes(), digest_size=16).digest()
