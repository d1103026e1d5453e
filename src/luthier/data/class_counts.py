"""How often each class occurs, and what must hold of classes before a model learns them.

Idea: a class that no training row has cannot be learned, and one class alone teaches nothing; both are found before
the first step and named with an address.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from luthier.core.errors import DataError
from luthier.data.rendering.classes import shown
from luthier.data.token_store import TokenStore


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
        raise DataError(
            f"every training row has the class {store.classes[int(trained[0])]!r}",
            allowed="rows of two classes or more",
            do="add rows of other classes, or choose the column of the classes with data.columns",
        )
    unknown = np.flatnonzero(held[views] & ~np.isin(numbers, trained))
    if len(unknown):
        first = int(unknown[0])
        name, count = store.classes[int(numbers[first])], len(np.unique(views[unknown]))
        raise DataError(
            f"{count:,} held-out {'row has a class' if count == 1 else 'rows have classes'} that no training row has, "
            f"first {name!r}",
            allowed=shown([store.classes[int(number)] for number in trained]),
            do="add training rows of this class or take these rows out; where rows are drawn for evaluation "
            "(evaluation.fraction), another seed may leave one of them in training",
            where=where(int(store.rows[views[first]])),
        )
