"""Real numbers of every type in arrays: which types there are, widened to float32 and rounded from it.

Idea: numpy has no bfloat16. `ml_dtypes` adds it, so that an array says itself what its numbers are; but it converts
number by number and holds Python's lock meanwhile. A bfloat16 number is the upper half of a float32, so it is widened
by a shift, and narrowed by an addition and a shift, in numpy's own loops over whole numbers.
Equation: bits = (b + 0x7FFF + (b >> 16 & 1)) >> 16, b the bits of a float32: to the nearest, ties to even
Cost: widening one pass, narrowing seven, each at the speed of a cache for the blocks that merging takes.
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
_HALF: Final = 16
_NAN: Final = 0x7FC0


def is_real(dtype: DType) -> bool:
    """Whether numbers of this type are real ones: no whole, truth or complex values."""
    return dtype in REAL.values()


def step(dtype: DType) -> float:
    """From 1 to the next number of a type."""
    return float(ml_dtypes.finfo(dtype).eps)


def smallest(dtype: DType) -> float:
    """The smallest number above 0 with all its digits."""
    return float(ml_dtypes.finfo(dtype).tiny)


def widened(numbers: np.ndarray) -> Float[np.ndarray, ...]:
    """Numbers in float32; themselves where they are."""
    if numbers.dtype != BFLOAT16:
        with np.errstate(over="ignore", invalid="ignore"):
            return numbers.astype(FLOAT32, copy=False)
    wide = np.empty(numbers.shape, np.uint32)
    np.left_shift(numbers.view(np.uint16), _HALF, out=wide, dtype=np.uint32)
    return wide.view(FLOAT32)


def narrowed(numbers: Float[np.ndarray, ...], dtype: DType) -> Float[np.ndarray, ...]:
    """Numbers rounded once to a type, to the nearest and ties to even; themselves where they are of it."""
    if dtype != BFLOAT16 or numbers.dtype == BFLOAT16:
        with np.errstate(over="ignore", invalid="ignore"):
            return numbers.astype(dtype, copy=False)
    bits = np.ascontiguousarray(numbers, FLOAT32).reshape(-1).view(np.uint32)
    rounded = bits >> _HALF
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= _HALF
    found = rounded.astype(np.uint16)
    unknown = np.isnan(numbers).reshape(-1)
    if unknown.any():
        found[unknown] = _NAN
    return found.view(BFLOAT16).reshape(numbers.shape)
