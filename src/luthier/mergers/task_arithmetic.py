"""task_arithmetic: what models have learned is added to the base, or taken away.

Idea: the difference between a tuned model and its base is a vector that stands for what was learned. Vectors add:
several skills in one model, and less of one with a negative weight.
Equation: W = W_0 + scale sum_i w_i (W_i - W_0); with `normalize` the weights are divided by their sum
Source: Ilharco et al., "Editing models with task arithmetic", arXiv 2212.04089, section 2.
Cost: one read of each model and of the base.
Use when: a few skills are to be added to one base, or one is to be unlearned.
Not when: many changes overlap and cancel (ties, dare).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, final

from pydantic import Field

from luthier.core.errors import RecipeError
from luthier.mergers import BASE, Sums, WeightedSum


@final
class TaskArithmetic(WeightedSum):
    """The base and a weighted sum of changes."""

    requires: ClassVar[frozenset[str]] = frozenset({BASE})

    scale: float = Field(1.0, description="what the sum of all changes is multiplied by")
    normalize: bool = Field(False, description="whether the weights are divided by their sum")

    def shares(self, weights: Sequence[float], seen: Sequence[Sums]) -> tuple[float, ...]:
        total = math.fsum(weights) if self.normalize else 1.0
        if not total:
            raise RecipeError(f"the weights {list(weights)} have the sum 0", allowed="weights with another sum",
                              do="change a weight, or set normalize to false")  # fmt: skip
        scaled = [self.scale * weight / total for weight in weights]
        return (*scaled, 1 - math.fsum(scaled))
