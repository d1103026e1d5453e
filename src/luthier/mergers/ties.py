"""ties: trim small changes, elect a sign for each number, and take the mean of those that agree.

Idea: when several models are averaged, changes that matter are diluted by those that do not, and opposite ones cancel.
So each model keeps its largest changes only; each number then moves the way that the sum of them says, and only models
that agree have a part in how far.
Equation: d_i = w_i trim_density(W_i - W_0), gamma = sign(sum_i d_i) with + for a tie;
    W = W_0 + scale sum_{sign(d_i) = gamma} d_i / sum_{sign(d_i) = gamma} w_i; without `normalize` not divided
Source: Yadav et al., "TIES-Merging", arXiv 2306.01708, section 4; weights and ties of signs as in mergekit.
Cost: three reads of each model and of the base: two find the exact threshold of a tensor of any size.
Use when: three or more tunes of one base, with unlike skills.
Not when: two models (slerp, linear), or no base.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, final

import numpy as np
from pydantic import Field

from luthier.kernels.vectors import added
from luthier.maths.magnitudes import drawer_counts, drawer_of, inner_counts, kth_largest
from luthier.maths.signs import agreed
from luthier.mergers import BASE, Merger, Part, Rows, Sums


@final
class Ties(Merger):
    """Trim, elect, merge. Numbers as large as the last that is kept are kept too."""

    requires: ClassVar[frozenset[str]] = frozenset({BASE})
    passes: ClassVar[int] = 2

    density: float = Field(0.2, gt=0, le=1, description="share of each model's changes that is kept, the largest")
    scale: float = Field(1.0, description="what the merged change is multiplied by")
    normalize: bool = Field(True, description="whether changes that agree are averaged rather than added")

    def look(self, part: Part, seen: Sequence[Sums]) -> Sums:
        if not seen:
            return {"drawers": np.stack([drawer_counts(change) for change in part.changes])}
        kept = self._kept(part.size)
        places = [drawer_of(counts, kept)[0] for counts in seen[0]["drawers"]]
        found = [inner_counts(change, place) for change, place in zip(part.changes, places, strict=True)]
        return {"inner": np.stack(found)}

    def merge(self, part: Part, seen: Sequence[Sums]) -> Rows:
        pairs = zip(seen[0]["drawers"], seen[1]["inner"], strict=True)
        limits = [kth_largest(counts, inner, self._kept(part.size)) for counts, inner in pairs]
        trimmed = part.changes
        for change, limit in zip(trimmed, limits, strict=True):
            change *= np.abs(change) >= limit
        return added(part.origin, agreed(trimmed, part.weights, mean=self.normalize), self.scale)

    def _kept(self, size: int) -> int:
        return max(1, int(self.density * size))
