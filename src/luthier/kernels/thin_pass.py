"""A pass of the model in which rows take thin terms: which rows take which, and the terms of all sites."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from luthier.kernels.backend import Backend
from luthier.kernels.thin import ThinRows, ThinTerms, add_range

Layer = Callable[[Float[Tensor, "n in"]], Float[Tensor, "n out"]]


class Around(ABC):
    """What adapters do around a linear layer, each in rows of its own, without a backward pass."""

    @abstractmethod
    def through(self, x: Float[Tensor, "n in"], layer: Layer) -> Float[Tensor, "n out"]:
        """What comes out of the layer with all of it around. The layer's own output may be written to."""


@final
@dataclass(frozen=True)
class ThinTerm(Around):
    """The terms at one site and whose rows are whose: what is added to the output of a linear layer."""

    terms: ThinTerms
    rows: ThinRows
    backend: Backend

    def through(self, x: Float[Tensor, "n in"], layer: Layer) -> Float[Tensor, "n out"]:
        y = layer(x)
        self.add(x, y)
        return y

    def without(self, ranges: Container[tuple[int, int]]) -> ThinTerm:
        """The same for all rows but those of some ranges."""
        left = tuple(each for each in self.rows.ranges if each[:2] not in ranges)
        return self if len(left) == len(self.rows.ranges) else replace(self, rows=ThinRows(left))

    def add(self, x: Float[Tensor, "n in"], y: Float[Tensor, "n out"]) -> None:
        """Add to the rows of `y` the terms of those of `x`."""
        if self.rows.stop > len(x):
            raise ValueError(f"terms for {self.rows.stop} rows, of which there are {len(x)}")
        for each in self.rows.long:
            add_range(x, y, self.terms, each, self.backend.product)
        if self.rows.short:
            self.backend.thin(x, y, self.terms, self.rows)


@final
@dataclass(frozen=True)
class ThinPass:
    """The terms of a pass at all sites.

    `numbers` are those of the adapters that have rows; `odd` names, for each site, adapters that change it by something
    that is no low-rank term. `dtype` is what rows are in.
    """

    sites: Mapping[str, ThinTerms]
    odd: Mapping[str, frozenset[str]]
    numbers: Mapping[str, int]
    rows: ThinRows
    backend: Backend
    dtype: torch.dtype

    def at(self, site: str) -> ThinTerm | None:
        """The terms at a site; None where no adapter has any."""
        terms = self.sites.get(site)
        return None if terms is None else ThinTerm(terms, self.rows, self.backend)

    def has(self, site: str, adapter: str) -> bool:
        """Whether an adapter's change of a site is a low-rank term."""
        terms = self.sites.get(site)
        return terms is not None and self.numbers[adapter] in terms.terms

    def only_terms(self, site: str) -> bool:
        """Whether nothing but low-rank terms changes the rows of this pass at a site."""
        odd = self.odd.get(site)
        return not odd or odd.isdisjoint(self.numbers)
