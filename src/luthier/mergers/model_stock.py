"""model_stock: between the base and the mean of a few tunes, as far as their angle says.

Idea: tunes of one base with different seeds lie on a thin shell around a centre that is better than each. Two or three
of them and the base tell, by the angle between their changes, where the line from base to mean is nearest to it.
Equation: t = k cos / ((k - 1) cos + 1), cos = the mean cosine of two of the k changes, at least 0;
    W = t mean_i W_i + (1 - t) W_0
Source: Jang, Yun and Han, "Model Stock", arXiv 2403.19522, section 4, equation 5. A negative cosine gives the base.
Cost: two reads of each model and of the base.
Use when: a few runs of one recipe from one base.
Not when: the tunes learned unlike things: the angle is then wide, and little of them is left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, final

import numpy as np
from jaxtyping import Float

from luthier.maths.spheres import cosine
from luthier.mergers import BASE, GRAM, Sums, WeightedSum


@final
class ModelStock(WeightedSum):
    """Where the angle puts the centre. Weights do not matter."""

    requires: ClassVar[frozenset[str]] = frozenset({BASE})
    passes: ClassVar[int] = 1
    models: ClassVar[tuple[int, int | None]] = (2, None)

    @property
    def looks_at(self) -> Literal["weights", "changes"]:
        return "changes"

    def shares(self, weights: Sequence[float], seen: Sequence[Sums]) -> tuple[float, ...]:
        share, _ = self._share(seen[0][GRAM])
        return (*[share / len(weights)] * len(weights), 1 - share)

    def told(self, weights: Sequence[float], seen: Sequence[Sums]) -> dict[str, Any]:
        share, cos = self._share(seen[0][GRAM])
        return {"t": share, "angle_degrees": math.degrees(math.acos(cos))}

    def _share(self, products: Float[np.ndarray, "k k"]) -> tuple[float, float]:
        """How far from the base to the mean, and the mean cosine."""
        count = len(products)
        cosines = [cosine(products, one, other) for one in range(count) for other in range(one)]
        cos = max(0.0, math.fsum(cosines) / len(cosines))
        return count * cos / ((count - 1) * cos + 1), cos
