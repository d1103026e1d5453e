"""karcher: the mean of any number of models on the sphere; slerp for more than two.

Idea: the point on the sphere with the smallest sum of squared angles to all directions does not depend on their order,
as slerp of slerps would. Its length is the mean of the lengths.
Equation: m = argmin_m sum_i w_i angle(m, W_i/|W_i|)^2, W = m sum_i w_i |W_i| / sum_i w_i
Source: Karcher, "Riemannian center of mass and mollifier smoothing" (1977), by its fixed-point iteration; as a merge
    method in mergekit.
Cost: two reads of each model. The iteration runs on the inner products of whole tensors: a matrix of models by models.
Use when: three or more models of one shape, base or not.
Not when: they are almost parallel, as tunes of one base are: linear gives the same for half the reads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, final

from luthier.core.errors import RecipeError
from luthier.maths.spheres import cosine, karcher_weights
from luthier.mergers import GRAM, Sums, WeightedSum


@final
class Karcher(WeightedSum):
    """The spherical mean, with weights."""

    passes: ClassVar[int] = 1
    models: ClassVar[tuple[int, int | None]] = (2, None)

    def shares(self, weights: Sequence[float], seen: Sequence[Sums]) -> tuple[float, ...]:
        if min(weights) < 0 or not sum(weights):
            raise RecipeError(f"the weights are {list(weights)}", allowed="weights from 0 on, not all of them 0")
        return tuple(karcher_weights(seen[0][GRAM], weights))

    def told(self, weights: Sequence[float], seen: Sequence[Sums]) -> dict[str, Any]:
        products = seen[0][GRAM]
        widest = min(cosine(products, one, other) for one in range(len(products)) for other in range(one))
        return {"angle_degrees": math.degrees(math.acos(widest))}
