"""dare: drop most changes at random, and let the rest stand for them.

Idea: what fine-tuning changes is redundant: most of it can be dropped at random when the rest is made larger by the
share that is gone, since the sum that a layer computes keeps its mean. Few changes of different models then fall on the
same number, so they disturb each other less.
Equation: d_i = m_i (W_i - W_0) / density, m ~ Bernoulli(density); W = W_0 + scale sum_i w_i d_i, or, with
    fuse: ties, the sign election and disjoint mean of ties over w_i d_i; without `rescale` not divided by density
Source: Yu et al., "Language models are super Mario", arXiv 2311.03099, sections 3.1 and 3.2. Rescaled by 1 / density as
    there; mergekit's `rescale` matches the L1 norm instead.
Cost: one read of each model and of the base. The mask depends on seed, tensor, model and position alone.
Use when: several tunes of one base whose changes are small.
Not when: changes are large (a long continued training): dropping many then harms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, final

from pydantic import Field

from luthier.kernels.vectors import added, combined
from luthier.maths.numbered_draws import key_of, uniform
from luthier.maths.signs import agreed
from luthier.mergers import BASE, Merger, Part, Rows, Sums


@final
class Dare(Merger):
    """Drop and rescale, then add, or vote as ties does."""

    requires: ClassVar[frozenset[str]] = frozenset({BASE})
    ordered: ClassVar[bool] = True

    density: float = Field(0.5, gt=0, le=1, description="share of each model's changes that is kept, at random")
    fuse: Literal["linear", "ties"] = Field("linear", description="how what is left of each model is put together")
    rescale: bool = Field(True, description="whether what is kept is divided by density")
    normalize: bool = Field(False, description="whether changes are averaged by their weights rather than added")
    scale: float = Field(1.0, description="what the merged change is multiplied by")
    seed: int = Field(0, ge=0, description="of what is dropped")

    def merge(self, part: Part, seen: Sequence[Sums]) -> Rows:
        kept = []
        for number, change in enumerate(part.changes):
            draws = uniform(key_of(self.seed, part.key, number), part.first, change.size).reshape(change.shape)
            change *= draws < self.density
            if self.rescale and self.density < 1:
                change /= self.density
            kept.append(change)
        if self.fuse == "ties":
            fused = agreed(kept, part.weights, mean=self.normalize)
        else:
            fused = combined(kept, part.weights, mean=self.normalize)
        return added(part.origin, fused, self.scale)
