"""passthrough: layers of one or several models, stacked.

Idea: a deeper model from layers that exist: slices of models one above the other, some perhaps twice. Nothing is
computed; each tensor comes from one model.
Equation: W = scale W_1
Source: the practice of stacking layers ("frankenmerging"); depth up-scaling as in Kim et al., "SOLAR 10.7B", arXiv
    2312.15166, section 2.1, which trains the result further.
Cost: one read and one write.
Use when: a deeper model is to be trained further from a shallower one.
Not when: the result is to be used as it is: stacked layers rarely help before more training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, final

from pydantic import Field

from luthier.mergers import Sums, WeightedSum


@final
class Passthrough(WeightedSum):
    """One model, times a number."""

    models: ClassVar[tuple[int, int | None]] = (1, 1)
    ordered: ClassVar[bool] = True

    scale: float = Field(1.0, description="what each number is multiplied by")

    def shares(self, weights: Sequence[float], seen: Sequence[Sums]) -> tuple[float, ...]:
        return (self.scale,)
