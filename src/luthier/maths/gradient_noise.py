"""The simple noise scale: how many rows a batch may have before more of them are wasted.

Idea: a gradient of few rows is the true one plus noise, whose size falls with the number of rows. Norms at two batch
sizes tell both apart without a bias that either has alone.
Equation: |G|^2 = (B |g_B|^2 - b |g_b|^2) / (B - b); tr(Sigma) = (|g_b|^2 - |g_B|^2) / (1 / b - 1 / B);
    B_simple = tr(Sigma) / |G|^2.
Source: McCandlish, Kaplan, Amodei et al., arXiv 1812.06162, equation 2.9 and appendix A.1.
Cost: none beside the gradients; one of them is kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Noise:
    """Estimates from micro-batches of `rows` rows each: |G|^2 and tr(Sigma), for a batch of one row."""

    micro_batches: int
    rows: int
    small: float
    large: float

    @property
    def signal(self) -> float:
        """|G|^2, without bias: below zero where noise drowns it."""
        whole = self.rows * self.micro_batches
        return (whole * self.large - self.rows * self.small) / (whole - self.rows)

    @property
    def noise(self) -> float:
        """tr(Sigma), without bias."""
        return (self.small - self.large) / (1 / self.rows - 1 / (self.rows * self.micro_batches))

    @property
    def scale(self) -> float | None:
        """B_simple in rows; None where it is more rows than were seen: the mean of all is then mostly noise."""
        whole = self.rows * self.micro_batches
        return self.noise / self.signal if self.signal > 0 and self.noise <= whole * self.signal else None


def noise_of(gradients: Iterable[Float[Tensor, " n"]], rows: int) -> Noise:
    """The estimates from gradients of micro-batches of `rows` rows each, two at least, which are means over rows."""
    mean, squares, count = None, 0.0, 0
    for gradient in gradients:
        wide = gradient.float()
        squares += float(torch.linalg.vector_norm(wide, dtype=torch.float64)) ** 2
        mean = wide.clone() if mean is None else mean.add_(wide)
        count += 1
    if mean is None or count < 2:
        return Noise(count, rows, 0.0, 0.0)
    return Noise(count, rows, squares / count, float(torch.linalg.vector_norm(mean / count, dtype=torch.float64)) ** 2)
