"""Torch's tensors and numpy's arrays as views of each other: the same memory, never a copy.

Idea: what reads, writes and merges files works on arrays and needs no torch; what trains and runs models has tensors.
They meet here. Types that numpy lacks (bfloat16, float8) go through whole numbers of their size.
Use when: a tensor goes into a file or beside an array, or numbers of a file into a model. Who writes into one writes
into the other.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor

from luthier.kernels.floats import REAL, DType

_SAME: Final = {
    torch.int64: np.int64, torch.int32: np.int32, torch.int16: np.int16, torch.int8: np.int8, torch.uint64: np.uint64,
    torch.uint32: np.uint32, torch.uint16: np.uint16, torch.uint8: np.uint8, torch.bool: np.bool_,
    torch.complex64: np.complex64,
}  # fmt: skip
_BITS: Final = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8, torch.float8_e5m2: torch.uint8}
"""What numpy has no type for, as whole numbers of the same size."""
_ARRAYS: Final[dict[torch.dtype, DType]] = {
    **{getattr(torch, name): dtype for name, dtype in REAL.items()},
    **{dtype: np.dtype(own) for dtype, own in _SAME.items()},
}
_TENSORS: Final = {own: dtype for dtype, own in _ARRAYS.items()}


def array_type(dtype: torch.dtype) -> DType:
    """The type of numbers as arrays have it. Raises KeyError for one that no file has."""
    return _ARRAYS[dtype]


def tensor_type(dtype: DType) -> torch.dtype:
    """The type of numbers as tensors have it. Raises KeyError for one that no file has."""
    return _TENSORS[dtype]


def array_of(tensor: Tensor) -> np.ndarray:
    """A tensor on the CPU as an array over the same numbers."""
    plain = tensor.detach()
    if plain.dtype in _BITS:
        return plain.view(_BITS[plain.dtype]).numpy().view(_ARRAYS[plain.dtype])
    return plain.numpy()


def tensor_of(array: np.ndarray) -> Tensor:
    """An array as a tensor over the same numbers."""
    dtype = _TENSORS[array.dtype]
    if dtype not in _BITS:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(_ARRAYS[_BITS[dtype]])).view(dtype)
