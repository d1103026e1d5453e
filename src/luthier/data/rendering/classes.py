"""The classes of rows: names as they are found while reading, or a list that was given.

Idea: what a class is called is in the data, its number is ours. Numbers must not depend on the order of rows, so they
follow the sorted names; while rows are still being read, classes are numbered as they come.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, final

import numpy as np

from luthier.core.errors import DataError, RecipeError
from luthier.core.nearest import did_you_mean
from luthier.data.forest import Ints

_INTEGER: Final = re.compile(r"-?[0-9]+")
_SHOWN: Final = 12


@final
class Classes:
    """The numbers of classes: with `given` names their places in that list, otherwise the order of first sight."""

    def __init__(self, given: Sequence[str] | None = None) -> None:
        names = tuple(given or ())
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise RecipeError(f"the class {twice!r} is listed twice", allowed="each class once")
        self.given = given is not None
        self._ids = {name: index for index, name in enumerate(names)}

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._ids)

    def id_of(self, name: str) -> int:
        """The number of a class. Raises DataError for one that is not among those given."""
        found = self._ids.get(name)
        if found is not None:
            return found
        if self.given:
            raise DataError(
                f"the class {name!r} is unknown to the model",
                allowed=shown(self.names),
                do=did_you_mean(name, self.names) or "take the row out, or train with rows of this class",
            )
        return self._ids.setdefault(name, len(self._ids))

    def forget_after(self, count: int) -> None:
        """Keep the first `count` classes only."""
        if not self.given:
            for name in self.names[count:]:
                del self._ids[name]


def shown(names: Sequence[str]) -> str:
    """The names of classes for an error: the first of them, where they are many."""
    rest = f" and {len(names) - _SHOWN:,} others" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest


def in_order(names: Sequence[str]) -> tuple[str, ...]:
    """The names sorted: by number where all of them are whole numbers, otherwise as text."""
    if all(_INTEGER.fullmatch(name) for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def ranks(names: Sequence[str]) -> Ints:
    """For each name its place among the sorted names (n,)."""
    places = {name: place for place, name in enumerate(in_order(names))}
    return np.array([places[name] for name in names], np.int32)
