"""What a forest through a model gives to objectives, and what an objective gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class TokenOutputs:
    """One entry for each token with weight, in the order of `Layout`.

    `log_probs` are differentiable and in float32; `rows` and `trees` say where a token comes from. A task that has C
    classes gives the log-probabilities of all of them in `classes`, differentiable too.
    """

    log_probs: Float[Tensor, " N"]
    labels: Int[Tensor, " N"]
    weights: Float[Tensor, " N"]
    rows: Int[Tensor, " N"]
    trees: Int[Tensor, " N"]
    classes: Float[Tensor, "N C"] | None = None


@dataclass(frozen=True)
class LossReport:
    """A loss as a sum and the weight it must be divided by, never a mean.

    The loop divides once, by the weight of the whole optimizer step, so cutting a step into micro-batches, packing it
    or splitting it over devices cannot change a gradient. `metrics` are sums too, each with its own weight.
    """

    sum: Float[Tensor, ""]
    weight: float
    metrics: Mapping[str, tuple[float, float]] = field(default_factory=dict)
