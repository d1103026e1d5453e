"""Which way each number moves when several changes disagree: a vote, and the mean of those that voted with it.

Equation: gamma = sign(sum_i d_i), a tie counts as +; merged = sum_{i: sign(d_i) = gamma} d_i / sum_{...} w_i, for
    d_i = w_i x the change, zero where it was dropped; without `mean` the sum alone.
Source: Yadav et al., "TIES-Merging", arXiv 2306.01708, section 4 (elect, disjoint merge); weights as in mergekit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

_LITTLE = 1e-8


def agreed(
    changes: Sequence[Float[np.ndarray, "*shape"]], weights: Sequence[float], *, mean: bool
) -> Float[np.ndarray, "*shape"]:
    """The weighted changes that have the elected sign, as their mean or their sum. What is zero has no vote."""
    weighted = [change * weight for change, weight in zip(changes, weights, strict=True)]
    found = weighted[0].copy()
    for change in weighted[1:]:
        found += change
    elected = np.multiply(found >= 0, 2, dtype=found.dtype)
    elected -= 1
    found[...] = 0
    divisor, voted = np.zeros_like(found), np.empty_like(found)
    for change, weight in zip(weighted, weights, strict=True):
        # Turned so that the vote is up: what agrees is above zero, and what is no number stays none.
        change *= elected
        if mean:
            divisor += np.multiply(change > 0, weight, out=voted)
        found += np.maximum(change, 0, out=change)
    found *= elected
    if mean:
        # Where none agreed, or weights cancel, by one.
        divisor += np.abs(divisor) < _LITTLE
        found /= divisor
    return found
