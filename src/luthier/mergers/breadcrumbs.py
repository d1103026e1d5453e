"""breadcrumbs: each model's changes without the largest and without the small ones.

Idea: the smallest changes are noise; the very largest are outliers that shift a whole model when they are added. What
lies between is a trail of crumbs to what was learned.
Equation: d_i = (W_i - W_0) where its magnitude is below the gamma n largest and among the next density n, else 0;
    W = W_0 + scale sum_i w_i d_i, or, with fuse: ties, the sign election and disjoint sum of ties
Source: Davari and Belilovsky, "Model Breadcrumbs", arXiv 2312.06795, section 3; with signs as in mergekit's
    breadcrumbs_ties.
Cost: three reads of each model and of the base: two find the exact thresholds.
Use when: many tunes of one base are added.
Not when: few: what is cut off at the top is then missed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, final

import numpy as np
from pydantic import Field, model_validator

from luthier.core.errors import RecipeError
from luthier.kernels.vectors import added, combined
from luthier.maths.magnitudes import drawer_counts, drawer_of, inner_counts, kth_largest
from luthier.maths.signs import agreed
from luthier.mergers import BASE, Merger, Part, Rows, Sums


@final
class Breadcrumbs(Merger):
    """Cut off both ends, then add, or vote as ties does."""

    requires: ClassVar[frozenset[str]] = frozenset({BASE})
    passes: ClassVar[int] = 2

    density: float = Field(0.9, gt=0, le=1, description="share of each model's changes that is kept")
    gamma: float = Field(0.01, ge=0, lt=1, description="share of each model's changes that is dropped as the largest")
    fuse: Literal["linear", "ties"] = Field("linear", description="how what is left of each model is put together")
    normalize: bool = Field(False, description="whether changes are averaged by their weights rather than added")
    scale: float = Field(1.0, description="what the merged change is multiplied by")

    @model_validator(mode="after")
    def _leaves_room(self) -> Breadcrumbs:
        if self.density + self.gamma > 1 + 1e-9:
            raise RecipeError(f"density is {self.density} and gamma {self.gamma}", allowed="a sum of at most 1")
        return self

    def look(self, part: Part, seen: Sequence[Sums]) -> Sums:
        if not seen:
            return {"drawers": np.stack([drawer_counts(change) for change in part.changes])}
        found = [
            np.stack([inner_counts(change, drawer_of(counts, max(rank, 1))[0]) for rank in self._ranks(part.size)])
            for change, counts in zip(part.changes, seen[0]["drawers"], strict=True)
        ]
        return {"inner": np.stack(found)}

    def merge(self, part: Part, seen: Sequence[Sums]) -> Rows:
        crumbs = []
        for change, counts, inner in zip(part.changes, seen[0]["drawers"], seen[1]["inner"], strict=True):
            top, bottom = (kth_largest(counts, own, rank)
                           for own, rank in zip(inner, self._ranks(part.size), strict=True))  # fmt: skip
            sizes = np.abs(change)
            change *= (sizes < top) & (sizes >= bottom)
            crumbs.append(change)
        if self.fuse == "ties":
            fused = agreed(crumbs, part.weights, mean=self.normalize)
        else:
            fused = combined(crumbs, part.weights, mean=self.normalize)
        return added(part.origin, fused, self.scale)

    def _ranks(self, size: int) -> tuple[int, int]:
        """How many are too large, and how many are these and the kept ones together."""
        dropped = int(self.gamma * size)
        return dropped, min(size, dropped + max(1, int(self.density * size)))
