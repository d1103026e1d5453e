"""slerp: two models along the great circle between them, tensor by tensor.

Idea: the mean of two vectors is shorter than both. On the great circle through their directions length and direction
change evenly. The angle is that of whole tensors, flattened and of length one; the weights it gives are then those of
the tensors as they are. Two fine-tunes of one base are almost parallel as weights, so that the circle is a straight
line (|cos| > 0.9995: told for each tensor); what they have changed is not, and can be taken instead (`of: changes`).
Equation: w = arccos(<u, v>), W = sin((1-t) w)/sin w W_0 + sin(t w)/sin w W_1; (1-t) W_0 + t W_1 where |cos w| > 0.9995
Source: Shoemake (1985); for language models Lu, Luu and Buehler, arXiv 2409.03444, section 2.3. Per tensor, limit and
    weights as in mergekit.
Cost: two reads of each model, or one where a tensor of each fits into the memory that is given.
Use when: exactly two: a tuned model and the instruct model, say.
Not when: three or more (karcher: the result of slerp depends on their order); very small models, where the same
    paper found that it harms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, final

from pydantic import Field

from luthier.maths.spheres import STRAIGHT, cosine, slerp_weights
from luthier.mergers import GRAM, Sums, WeightedSum


@final
class Slerp(WeightedSum):
    """Between two models; t = 0 is the first, t = 1 the second."""

    passes: ClassVar[int] = 1
    models: ClassVar[tuple[int, int | None]] = (2, 2)
    ordered: ClassVar[bool] = True

    t: float = Field(0.5, ge=0, le=1, description="how far from the first model to the second")
    of: Literal["weights", "changes"] = Field(
        "weights", description="what is turned: weights, or what each model has changed of the base"
    )

    @property
    def looks_at(self) -> Literal["weights", "changes"]:
        return self.of

    def shares(self, weights: Sequence[float], seen: Sequence[Sums]) -> tuple[float, ...]:
        one, other = slerp_weights(cosine(seen[0][GRAM], 0, 1), self.t)
        return (one, other) if self.of == "weights" else (one, other, 1 - one - other)

    def told(self, weights: Sequence[float], seen: Sequence[Sums]) -> dict[str, Any]:
        cos = cosine(seen[0][GRAM], 0, 1)
        return {"t": self.t, "angle_degrees": math.degrees(math.acos(cos)), "lerp": abs(cos) > STRAIGHT}
