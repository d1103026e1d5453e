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
from typing import Any, ClassVar, final

from luthier.maths.spheres import combined, cosine, gram
from luthier.mergers import BASE, Merger, Part, Rows, Sums


@final
class ModelStock(Merger):
    """Where the angle puts the centre. Weights do not matter."""

    requires: ClassVar[frozenset[str]] = frozenset({BASE})
    passes: ClassVar[int] = 1
    models: ClassVar[tuple[int, int | None]] = (2, None)
    linear_in: ClassVar[bool] = True

    def look(self, part: Part, seen: Sequence[Sums]) -> Sums:
        return {"gram": gram(part.changes)}

    def merge(self, part: Part, seen: Sequence[Sums]) -> Rows:
        share, _ = self._share(seen)
        count = len(part.models)
        return combined((*part.models, part.origin), (*[share / count] * count, 1 - share))

    def told(self, weights: Sequence[float], seen: Sequence[Sums]) -> dict[str, Any]:
        share, cos = self._share(seen)
        return {"t": share, "angle_degrees": math.degrees(math.acos(cos))}

    def _share(self, seen: Sequence[Sums]) -> tuple[float, float]:
        """How far from the base to the mean, and the mean cosine."""
        products = seen[0]["gram"]
        count = len(products)
        cosines = [cosine(products, one, other) for one in range(count) for other in range(one)]
        cos = max(0.0, math.fsum(cosines) / len(cosines))
        return count * cos / ((count - 1) * cos + 1), cos
