"""Which way each number moves when several changes disagree: a vote, and the mean of those that voted with it.

Equation: gamma = sign(sum_i d_i), a tie counts as +; merged = sum_{i: sign(d_i) = gamma} d_i / sum_{...} w_i, for
    d_i = w_i x the change, zero where it was dropped; without `mean` the sum alone.
Source: Yadav et al., "TIES-Merging", arXiv 2306.01708, section 4 (elect, disjoint merge); weights as in mergekit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

_LITTLE = 1e-8


def agreed(
    changes: Sequence[Float[Tensor, "*shape"]], weights: Sequence[float], *, mean: bool
) -> Float[Tensor, "*shape"]:
    """The weighted changes that have the elected sign, as their mean or their sum. What is zero has no vote."""
    weighted = [change * weight for change, weight in zip(changes, weights, strict=True)]
    total = torch.stack(weighted).sum(0)
    elected = torch.where(total >= 0, 1.0, -1.0)
    found, divisor = torch.zeros_like(total), torch.zeros_like(total)
    for change, weight in zip(weighted, weights, strict=True):
        own = change.sign() == elected
        found.add_(torch.where(own, change, 0.0))
        if mean:
            divisor.add_(own, alpha=weight)
    if not mean:
        return found
    return found / torch.where(divisor.abs() < _LITTLE, 1.0, divisor)
