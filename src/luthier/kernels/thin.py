"""Thin terms: the low-rank terms of many adapters at one site, each added to rows of its own, without a backward pass.

Idea: when text is made, a row or two belong to an adapter, and its factors are all that has to be read. Terms are kept
by number, the second factor turned so that both are read along their rows; a pass says once which rows take which
terms with which weights, and each site is one call then, however many adapters there are. Several terms on one row add
up, each with its own scale and weight: side by side they are one term of the sum of their ranks, and exact.
Long ranges of one adapter (a long prompt that is read) are products of many rows.
Equation: y_i += sum_j w_ij s_j B_j A_j x_i over the terms j of row i.
Source: Chen et al., arXiv 2310.18547 (Punica), section 4: gathered matrix-vector products.
Cost: r (in + out) numbers read for each adapter and site, 2 r (in + out) FLOPs a row; a copy of the factors.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from luthier.kernels.addresses import nowhere
from luthier.kernels.halves import add_low_rank

Numbered = tuple[tuple[int, float], ...]
"""Terms by their numbers, and what each is multiplied by."""
LONG: Final = 129
"""Rows of one range from which on products of many rows are faster, for ranks as they are common."""
TILE: Final = 4
"""Rows of one range that read a factor together."""


@final
@dataclass(frozen=True)
class ThinFactors:
    """The two factors of a term in the precision of the rows, both with a row for each rank."""

    down: Float[Tensor, "r in"]
    up: Float[Tensor, "r out"]
    scale: float

    @classmethod
    def of(
        cls, down: Float[Tensor, "r in"], up: Float[Tensor, "out r"], scale: float, dtype: torch.dtype
    ) -> ThinFactors:
        """The term `scale` up down x, as it stands now."""
        turned = up.detach().t().to(dtype).contiguous()
        return cls(down.detach().to(dtype).contiguous(), turned, scale)


@final
class ThinTerms:
    """The terms at one site, by number."""

    def __init__(self) -> None:
        self.terms: dict[int, ThinFactors] = {}
        # Where the factors lie, and their ranks: none where there is no term of that number.
        self.table = torch.zeros(8, 3, dtype=torch.int64)
        self.scales = torch.zeros(8, dtype=torch.float32)
        self._stacks: tuple[Tensor, Tensor, dict[int, int]] | None = None

    def put(self, number: int, term: ThinFactors) -> None:
        """Have a term under a number."""
        self.reserve(number + 1)
        self.terms[number] = term
        self._stacks = None
        places = (each.data_ptr() or nowhere(each) for each in (term.down, term.up))
        self.table[number] = torch.tensor([*places, len(term.down)])
        self.scales[number] = term.scale

    def reserve(self, count: int) -> None:
        """Have a row of the table for each number below `count`."""
        if count > len(self.table):
            room = max(count, 2 * len(self.table)) - len(self.table)
            self.table = torch.cat([self.table, self.table.new_zeros(room, 3)])
            self.scales = torch.cat([self.scales, self.scales.new_zeros(room)])

    def drop(self, number: int) -> None:
        """Have none under it any more."""
        if self.terms.pop(number, None) is not None:
            self._stacks = None
            self.table[number] = 0

    @property
    def stacks(self) -> tuple[Float[Tensor, "terms r in"], Float[Tensor, "terms r out"], Mapping[int, int]]:
        """All factors as two tensors, the scales in the second, padded to the largest rank; where each number is."""
        if self._stacks is None:
            downs = [each.down for each in self.terms.values()]
            ups = [each.up * each.scale for each in self.terms.values()]
            places = {number: place for place, number in enumerate(self.terms)}
            pad = torch.nn.utils.rnn.pad_sequence
            self._stacks = pad(downs, batch_first=True), pad(ups, batch_first=True), places
        return self._stacks


@final
@dataclass(frozen=True)
class ThinRows:
    """Which rows of a pass take which terms: ranges `start` to `stop`, with terms by number."""

    ranges: tuple[tuple[int, int, Numbered], ...]
    longest: int = LONG
    """Rows of a range from which on it goes by itself."""

    @cached_property
    def together(self) -> ThinRows:
        """The same, with no range that goes by itself."""
        return replace(self, longest=sys.maxsize)

    @cached_property
    def stop(self) -> int:
        """Where the last range ends."""
        return max((stop for _, stop, _ in self.ranges), default=0)

    @cached_property
    def long(self) -> tuple[tuple[int, int, Numbered], ...]:
        """Ranges that go one by one."""
        return tuple(each for each in self.ranges if each[1] - each[0] >= self.longest)

    @cached_property
    def short(self) -> tuple[tuple[int, int, Numbered], ...]:
        """Ranges that go together."""
        return tuple(each for each in self.ranges if each[1] - each[0] < self.longest)

    @cached_property
    def tiles(self) -> Int[Tensor, "tiles 3"]:
        """Of the short ranges: first rows, how many, and which range they are of."""
        found = [
            (row, min(TILE, stop - row), index)
            for index, (start, stop, _) in enumerate(self.short)
            for row in range(start, stop, TILE)
        ]
        return torch.tensor(found, dtype=torch.int64).reshape(-1, 3)

    @cached_property
    def top(self) -> int:
        """One more than the largest number of the short ranges."""
        return 1 + max((number for *_, parts in self.short for number, _ in parts), default=-1)

    @cached_property
    def firsts(self) -> Int[Tensor, " firsts"]:
        """Where the terms of each short range begin among those of all of them."""
        return torch.tensor([0, *(len(parts) for *_, parts in self.short)], dtype=torch.int64).cumsum(0)

    @cached_property
    def numbers(self) -> Int[Tensor, " parts"]:
        """The terms of the short ranges."""
        return torch.tensor([number for *_, parts in self.short for number, _ in parts], dtype=torch.int64)

    @cached_property
    def weights(self) -> Float[Tensor, " parts"]:
        """What each of them is multiplied by."""
        return torch.tensor([weight for *_, parts in self.short for _, weight in parts], dtype=torch.float32)


def add_range(
    x: Float[Tensor, "n in"],
    y: Float[Tensor, "n out"],
    terms: ThinTerms,
    own: tuple[int, int, Numbered],
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor],
) -> None:
    """Add the terms of one range by products of many rows; `product` is that of the backend."""
    start, stop, parts = own
    for number, weight in parts:
        term = terms.terms.get(number)
        if term is not None:
            low = product(x[start:stop], term.down, None).mul_(term.scale * weight)
            add_low_rank(y[start:stop], low, term.up)


def add_gathered(
    x: Float[Tensor, "n in"],
    y: Float[Tensor, "n out"],
    terms: ThinTerms,
    ranges: Sequence[tuple[int, int, Numbered]],
) -> None:
    """Add the terms of short ranges in plain torch: a handful of operations, however many there are."""
    downs, ups, places = terms.stacks
    pairs = [
        (row, places[number], weight)
        for start, stop, parts in ranges
        for number, weight in parts
        if number in places
        for row in range(start, stop)
    ]
    if not pairs:
        return
    rows, chosen, weights = zip(*pairs, strict=True)
    at = torch.tensor(rows, device=x.device)
    own = torch.tensor(chosen, device=x.device)
    low = torch.bmm(downs[own], x[at][:, :, None])[:, :, 0]
    low *= torch.tensor(weights, dtype=low.dtype, device=x.device)[:, None]
    y.index_add_(0, at, torch.bmm(low[:, None], ups[own])[:, 0])
