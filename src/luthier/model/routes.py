"""Routes: which rows of a batch belong to which adapter, where several are in one batch.

Idea: a tree names its adapter, and a forest is laid end to end tree by tree, so the rows of an adapter are ranges. The
base computes all rows at once; what an adapter changes at a site, it changes in its own ranges. No row is ever put
through the edit of another adapter, not even to be multiplied by zero: what is not finite stays where it is.
A name may stand for a mix: several adapters, each with a weight (mixes.py). The name "" stands for the base alone.
Source: one base and many adapters in a batch: Punica, arXiv 2310.18547; in training: ASPEN, arXiv 2312.02515.
Cost: the base's products once; each adapter's own products on its own rows; a copy of the rows at each edited site
    where edits are computed one by one. Fewest ranges where the trees of an adapter follow each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import final

from torch import Tensor

from luthier.core.errors import RecipeError
from luthier.data.forest import Forest
from luthier.kernels.thin_pass import ThinPass


@final
@dataclass(frozen=True)
class Route:
    """Rows `start` to `stop`, all of one adapter."""

    adapter: str
    start: int
    stop: int


Parts = tuple[tuple[str, float], ...]
"""Attachments and what the change of each is multiplied by; none is the base alone."""
Mixes = Mapping[str, Parts]
"""What names stand for that are not those of single attachments."""
_NONE: Mixes = MappingProxyType({})


def parts_of(name: str, mixes: Mixes) -> Parts:
    """What a name stands for."""
    found = mixes.get(name)
    return found if found is not None else ((name, 1.0),) if name else ()


@final
@dataclass(frozen=True)
class Routes:
    """Ranges that cover all rows, in order.

    What flows between modules is (1, rows, ...), or, of a padded batch, (rows, one of `widths`, ...). `mixes` has the
    parts of each name that is not that of a single attachment. `thin` adds the low-rank terms of all rows at a site at
    once, in passes without gradients.
    """

    runs: tuple[Route, ...]
    widths: tuple[int, ...] = ()
    mixes: Mixes = field(default_factory=dict)
    thin: ThinPass | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names, each once, in the order in which they come."""
        return tuple(dict.fromkeys(run.adapter for run in self.runs))

    def parts(self, name: str) -> Parts:
        """What a name stands for."""
        return parts_of(name, self.mixes)

    @cached_property
    def attachments(self) -> tuple[str, ...]:
        """The attachments that have rows here, alone or in a mix."""
        return tuple(dict.fromkeys(part for name in self.names for part, _ in self.parts(name)))

    @cached_property
    def every(self) -> Parts:
        """Those attachments as if all of them were on every row."""
        return tuple((name, 1.0) for name in self.attachments)

    @property
    def count(self) -> int:
        """How many rows there are."""
        return self.runs[-1].stop if self.runs else 0

    @property
    def sizes(self) -> list[int]:
        """How many rows each range has."""
        return [run.stop - run.start for run in self.runs]

    def axis_of(self, x: Tensor) -> int:
        """Along which axis the rows of `x` lie. Raises RecipeError for a tensor that is no batch as it was laid out."""
        count, wide = (self.count, self.widths) if self.widths else (1, (self.count,))
        # A module that regroups tokens (experts) may hand on as many rows as there are, in another order.
        if x.shape[0] != count or x.shape[1] not in wide or (x.is_floating_point() and x.ndim < 3):
            raise RecipeError(
                f"a module with an adapter was given a tensor of shape {tuple(x.shape)}, whose rows nobody can tell "
                "apart",
                allowed=f"{count} x {' or '.join(map(str, wide))} tokens in the order of the batch",
                do="train the adapters of this model one at a time",
            )
        return 0 if self.widths else 1


def whole(adapter: str, count: int, mixes: Mixes = _NONE) -> Routes:
    """All of `count` rows for one adapter."""
    return Routes((Route(adapter, 0, count),), mixes=mixes)


def routes_over(parts: Iterable[tuple[str, int]], mixes: Mixes = _NONE) -> Routes:
    """Adapters, and how many rows each has, one after another."""
    return Routes(_runs(parts), mixes=mixes)


def routes_of(forest: Forest, mixes: Mixes = _NONE) -> Routes | None:
    """Which tokens of a forest belong to which adapter; None where no tree names one.

    Raises RecipeError when some trees do and others do not.
    """
    unnamed = sum(not tree.adapter for tree in forest.trees)
    if unnamed == len(forest.trees):
        return None
    if unnamed:
        raise RecipeError(
            f"{unnamed} of {len(forest.trees)} trees name no adapter, the others do",
            allowed="a batch in which every tree names its adapter, or none does",
            do="give each tree the name of an attachment",
        )
    return routes_over(((tree.adapter, tree.token_count) for tree in forest.trees), mixes)


def predicted_routes(forest: Forest, mixes: Mixes = _NONE) -> Routes:
    """Which predicted tokens of a forest, in the order of its layout, belong to which adapter."""
    counts = [0] * len(forest.trees)
    for tree in forest.layout.trees.tolist():
        counts[tree] += 1
    named = zip(forest.trees, counts, strict=True)
    return routes_over(((tree.adapter, count) for tree, count in named), mixes)


def padded_routes(forest: Forest, width: int, mixes: Mixes = _NONE) -> Routes | None:
    """Which rows of a padded batch, one for each tree and `width` wide, belong to which adapter."""
    if routes_of(forest) is None:
        return None
    return batch_routes([tree.adapter for tree in forest.trees], (width,), mixes)


def batch_routes(adapters: Sequence[str], widths: tuple[int, ...], mixes: Mixes = _NONE) -> Routes:
    """The rows of a padded batch by their adapters; modules of one model may be given it in several `widths`."""
    return Routes(_runs((adapter, 1) for adapter in adapters), widths, mixes)


def _runs(parts: Iterable[tuple[str, int]]) -> tuple[Route, ...]:
    """Neighbours of one adapter joined; parts without rows left out."""
    runs: list[Route] = []
    start = 0
    for adapter, count in parts:
        if count and runs and runs[-1].adapter == adapter:
            runs[-1] = Route(adapter, runs[-1].start, start + count)
        elif count:
            runs.append(Route(adapter, start, start + count))
        start += count
    return tuple(runs)
