"""Real numbers of every type in arrays: which types there are, widened to float32 and rounded from it.

Idea: numpy has no bfloat16. `ml_dtypes` adds it, so that an array says itself what its numbers are.
Cost: of the blocks that merging takes a number is widened in less than a tenth of a nanosecond and rounded in half of
one (a core of a Zen 4, ml_dtypes 0.6), faster than by shifts in numpy's own loops.
Use when: numbers of files are computed with and torch is not wanted. Not when: C++ reads them as they lie (vectors.py).
"""

from __future__ import annotations

from typing import Any, Final

import ml_dtypes
import numpy as np
from jaxtyping import Float

DType = np.dtype[Any]
"""A type of numbers."""
FLOAT32: Final[DType] = np.dtype(np.float32)
FLOAT16: Final[DType] = np.dtype(np.float16)
BFLOAT16: Final[DType] = np.dtype(ml_dtypes.bfloat16)
REAL: Final[dict[str, DType]] = {
    "float64": np.dtype(np.float64),
    "float32": FLOAT32,
    "float16": FLOAT16,
    "bfloat16": BFLOAT16,
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
"""Types of real numbers by their names, which are torch's too."""


def is_real(dtype: DType) -> bool:
    """Whether numbers of this type are real ones: no whole, truth or complex values."""
    return dtype in REAL.values()


def step(dtype: DType) -> float:
    """From 1 to the next number of a type."""
    return float(ml_dtypes.finfo(dtype).eps)


def smallest(dtype: DType) -> float:
    """The smallest number above 0 with all its digits."""
    return float(ml_dtypes.finfo(dtype).tiny)


def widened(numbers: np.ndarray) -> Float[np.ndarray, "*shape"]:
    """Numbers in float32; themselves where they are."""
    return narrowed(numbers, FLOAT32)


def narrowed(numbers: np.ndarray, dtype: DType) -> Float[np.ndarray, "*shape"]:
    """Numbers rounded once to a type, to the nearest and ties to even; themselves where they are of it."""
    with np.errstate(over="ignore", invalid="ignore"):
        return numbers.astype(dtype, copy=False)
