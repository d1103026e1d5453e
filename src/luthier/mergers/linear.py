"""linear: the weighted mean of weights.

Idea: models tuned from the same base often lie in one valley; the mean of their weights lies in it too, and deeper.
Equation: W = sum_i w_i W_i / sum_i w_i; without `normalize` the sum is not divided
Source: Wortsman et al., "Model soups", arXiv 2203.05482, section 2 (uniform soup).
Cost: one read of each model and one write; nothing is kept.
Use when: several runs of one recipe, or seeds of one run, are to be one model.
Not when: the models learned unlike things: changes that cancel are lost (ties, dare).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

from pydantic import Field

from luthier.core.errors import RecipeError
from luthier.mergers import Sums, WeightedSum


@final
class Linear(WeightedSum):
    """A weighted mean."""

    normalize: bool = Field(True, description="whether the weights are divided by their sum")

    def shares(self, weights: Sequence[float], seen: Sequence[Sums]) -> tuple[float, ...]:
        total = math.fsum(weights) if self.normalize else 1.0
        if not total:
            raise RecipeError(f"the weights {list(weights)} have the sum 0", allowed="weights with another sum",
                              do="change a weight, or set normalize to false")  # fmt: skip
        return tuple(weight / total for weight in weights)
