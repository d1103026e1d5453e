"""Means on a sphere, told as weights of the vectors they are made of.

Idea: whatever lies between vectors on a great circle is a weighted sum of them, and the weights depend on their inner
products alone. So a tensor of any size is looked at once, for a few numbers, and combined in a second look.
Equation: slerp: w = arccos(cos), c0 = sin((1-t) w) / sin w, c1 = sin(t w) / sin w; for |cos| > 0.9995 the straight line
    1 - t, t. Karcher: m <- cos|T| m + sin|T| T / |T|, T = sum_i w_i log_m(u_i),
    log_m(u) = theta (u - cos(theta) m) / sin(theta), theta = arccos(m u), until |T| is small.
Source: Shoemake, "Animating rotation with quaternion curves" (1985); Karcher, "Riemannian center of mass" (1977). The
    limit of the straight line is the one merging tools use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
from jaxtyping import Float

STRAIGHT: Final = 0.9995
"""The cosine beyond which a great circle is taken for a straight line."""
_STEPS: Final = 100
_STILL: Final = 1e-12
"""A tangent shorter than this does not move a mean any more."""


def cosine(products: Float[np.ndarray, "k k"], one: int, other: int) -> float:
    """The cosine of the angle between two vectors by their inner products; 0 where one of them is zero."""
    lengths = float(products[one, one]) * float(products[other, other])
    return 0.0 if lengths <= 0 else max(-1.0, min(1.0, float(products[one, other]) / math.sqrt(lengths)))


def slerp_weights(cos: float, t: float, *, straight: float = STRAIGHT) -> tuple[float, float]:
    """The weights of the two ends at `t` of the way between them."""
    if abs(cos) > straight:
        return 1 - t, t
    angle = math.acos(cos)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def karcher_weights(products: Float[np.ndarray, "k k"], weights: Sequence[float]) -> list[float]:
    """The weights of vectors in their mean: its direction the Karcher mean's, its length the mean of their lengths.

    Vectors that are zero have no direction and count for the length alone.
    """
    lengths = np.sqrt(products.diagonal().clip(min=0))
    total = math.fsum(weights)
    shares = np.array(weights, np.float64) / total
    there = lengths > 0
    found: list[float]
    if not there.any():
        found = shares.tolist()
        return found
    inverse = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=there)
    units = products * inverse[:, None] * inverse[None, :]
    pull = shares * there
    mean = pull / _length(units, pull)
    for _ in range(_STEPS):
        cosines = (units @ mean).clip(-1, 1)
        angles = np.arccos(cosines)
        stretch = np.where(angles > 1e-8, angles / np.sin(angles).clip(min=1e-300), 1.0)
        tangent = pull * stretch - mean * float((pull * stretch * cosines).sum())
        step = _length(units, tangent)
        if step < _STILL:
            break
        mean = math.cos(step) * mean + math.sin(step) * tangent / step
        mean = mean / _length(units, mean)
    found = (mean * inverse * float((shares * lengths).sum())).tolist()
    return found


def _length(units: Float[np.ndarray, "k k"], weights: Float[np.ndarray, " k"]) -> float:
    return math.sqrt(max(float(weights @ units @ weights), 0.0))
