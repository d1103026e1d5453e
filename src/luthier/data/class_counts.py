"""How often each class occurs, and what must hold of classes before a model learns them.

Idea: a class that no training row has cannot be learned, and one class alone teaches nothing; both are found before
the first step and named with an address.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import final

import numpy as np
from numpy.typing import NDArray

from luthier.core.errors import DataError
from luthier.data.rendering.classes import Classes, in_order, shown
from luthier.data.rendering.rendered import Rendered
from luthier.data.token_store import TokenStore


@final
class ClassCounts:
    """Counts the classes of rows that pass by, of training rows and of held-out ones."""

    def __init__(self, classes: Classes) -> None:
        self._classes = classes
        self._counts: Counter[int] = Counter()
        self._trained: set[int] = set()
        self._held: Counter[frozenset[int]] = Counter()
        self._first: dict[int, str] = {}

    def see(self, views: Sequence[Rendered], where: str, *, held: bool) -> None:
        """Count the classes of one row."""
        labels = [view.labels for view in views if view.labels is not None]
        found = [number for each in labels for number in each[each >= 0].tolist()]
        self._counts.update(found)
        if not held:
            self._trained.update(found)
            return
        self._held[frozenset(found)] += 1
        for number in found:
            self._first.setdefault(number, where)

    def by_name(self) -> dict[str, int]:
        """How often each class was seen, in the order in which classes are numbered."""
        names = self._classes.names
        return {name: self._counts[names.index(name)] for name in in_order(names)}

    def problems(self) -> list[DataError]:
        """What `demand_classes` would raise for these rows."""
        names = self._classes.names
        trained = in_order([names[number] for number in self._trained])
        found = [_alone(trained[0])] if len(trained) == 1 else []
        unknown = [number for number in self._first if number not in self._trained] if trained else []
        if unknown:
            count = sum(rows for numbers, rows in self._held.items() if not self._trained.issuperset(numbers))
            found.append(_unknown(count, names[unknown[0]], trained, self._first[unknown[0]]))
        return found


def classes_of_rows(store: TokenStore) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and a class of each, in the order of rows; a row with several classes comes once for each of them."""
    labels = np.asarray(store.labels)
    places = np.flatnonzero(labels >= 0)
    views = np.searchsorted(store.offsets, places, side="right") - 1
    count = len(store.classes)
    pairs = np.unique(np.asarray(store.rows)[views].astype(np.int64) * count + labels[places])
    return pairs // count, pairs % count


def demand_classes(store: TokenStore, held: NDArray[np.bool_], where: Callable[[int], str]) -> None:
    """Raise DataError where training rows have a single class, or a held-out row (`held`, by view) has one of its own.

    `where` gives the address of a row.
    """
    if store.labels is None:
        return
    places = np.flatnonzero(store.labels >= 0)
    views = np.searchsorted(store.offsets, places, side="right") - 1
    numbers = store.labels[places]
    trained = np.unique(numbers[~held[views]])
    if len(trained) == 1:
        raise _alone(store.classes[int(trained[0])])
    unknown = np.flatnonzero(held[views] & ~np.isin(numbers, trained))
    if len(unknown):
        first = int(unknown[0])
        name, count = store.classes[int(numbers[first])], len(np.unique(views[unknown]))
        known = [store.classes[int(number)] for number in trained]
        raise _unknown(count, name, known, where(int(store.rows[views[first]])))


def _alone(name: str) -> DataError:
    return DataError(
        f"every training row has the class {name!r}",
        allowed="rows of two classes or more",
        do="add rows of other classes, or choose the column of the classes with data.columns",
    )


def _unknown(count: int, first: str, trained: Sequence[str], where: str) -> DataError:
    return DataError(
        f"{count:,} held-out {'row has a class' if count == 1 else 'rows have classes'} that no training row has, "
        f"first {first!r}",
        allowed=shown(trained),
        do="add training rows of this class or take these rows out",
        where=where,
    )
