"""della: drop changes at random, small ones more often than large ones.

Idea: dare drops blindly, ties by size alone. Here the chance to stay grows with the rank of a change within its row,
from density - epsilon to density + epsilon, and what stays is divided by its own chance, so that the mean is kept.
Equation: p_j = density - epsilon + 2 epsilon rank_j / (n - 1), rank by |W_i - W_0| within a row of n;
    d_j = m_j change_j / p_j, m_j ~ Bernoulli(p_j); then the sign election and disjoint mean of ties, or a sum
Source: Deep et al., "DELLA-Merging", arXiv 2406.11617, section 3 (MAGPRUNE, elect, fuse); the window of chances is
    written as in mergekit, twice epsilon wide.
Cost: one read of each model and of the base; sorting each row makes it the slowest of all.
Use when: several tunes of one base, where dare loses too much.
Not when: dare or ties do as well: they are much faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Final, Literal, final

import numpy as np
from jaxtyping import Float
from pydantic import Field, model_validator

from luthier.core.errors import RecipeError
from luthier.kernels.vectors import added, combined
from luthier.maths.numbered_draws import key_of, uniform
from luthier.maths.signs import agreed
from luthier.mergers import BASE, Merger, Part, Rows, Sums

_PLACE: Final = 32
"""Bits of a place in a row."""


@final
class Della(Merger):
    """Drop by rank and rescale, then vote as ties does, or add."""

    requires: ClassVar[frozenset[str]] = frozenset({BASE})
    ordered: ClassVar[bool] = True

    density: float = Field(0.5, gt=0, le=1, description="share of each model's changes that is kept on average")
    epsilon: float = Field(0.1, ge=0, lt=0.5, description="how far the chance to stay goes below and above density")
    fuse: Literal["ties", "linear"] = Field("ties", description="how what is left of each model is put together")
    normalize: bool = Field(True, description="whether changes that agree are averaged rather than added")
    scale: float = Field(1.0, description="what the merged change is multiplied by")
    seed: int = Field(0, ge=0, description="of what is dropped")

    @model_validator(mode="after")
    def _are_chances(self) -> Della:
        if self.density < 1 and not self.epsilon < self.density <= 1 - self.epsilon:
            raise RecipeError(
                f"density {self.density} and epsilon {self.epsilon} give chances from "
                f"{self.density - self.epsilon:g} to {self.density + self.epsilon:g}",
                allowed="chances above 0 and up to 1",
                do="lower epsilon",
            )
        return self

    def merge(self, part: Part, seen: Sequence[Sums]) -> Rows:
        kept = []
        for number, change in enumerate(part.changes):
            if self.density == 1:
                kept.append(change)
                continue
            chances = self.chances(change)
            draws = uniform(key_of(self.seed, part.key, number), part.first, change.size).reshape(change.shape)
            change /= chances
            change *= draws < chances
            kept.append(change)
        if self.fuse == "ties":
            fused = agreed(kept, part.weights, mean=self.normalize)
        else:
            fused = combined(kept, part.weights, mean=self.normalize)
        return added(part.origin, fused, self.scale)

    def chances(self, change: Float[np.ndarray, "rows columns"]) -> Float[np.ndarray, "rows columns"]:
        """The chance of each change to stay."""
        columns = change.shape[-1]
        # Whole numbers are sorted in vectors: the magnitude's bits, which grow with it, and below them the place.
        keys = np.abs(change).view(np.uint32).astype(np.uint64)
        keys <<= _PLACE
        keys |= np.arange(columns, dtype=np.uint64)
        keys.sort(axis=-1)
        keys &= (1 << _PLACE) - 1
        steps = np.arange(columns, dtype=change.dtype)
        steps *= 2 * self.epsilon / max(columns - 1, 1)
        steps += self.density - self.epsilon
        found = np.empty_like(change)
        np.put_along_axis(found, keys.view(np.int64), np.broadcast_to(steps, change.shape), -1)
        return found
