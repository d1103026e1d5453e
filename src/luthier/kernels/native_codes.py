"""Codes of four bits as C++ reads them: where they and their scales lie. See native/codes.h."""

from __future__ import annotations

import ctypes
from typing import Final

from torch import Tensor

from luthier.kernels.addresses import nowhere
from luthier.kernels.backend import PairCodes

_POINTER: Final = ctypes.c_void_p


class LaidOutPairs(ctypes.Structure):
    """A weight; its tensors have to live as long."""

    _fields_ = (
        ("codes", _POINTER), ("scales", _POINTER), ("scale_codes", _POINTER), ("scale_levels", _POINTER),
        ("levels", _POINTER), ("group", ctypes.c_int64), ("block", ctypes.c_int64), ("mean", ctypes.c_float),
    )  # fmt: skip


def are_taken(weight: PairCodes) -> bool:
    """Whether the C++ reads it: two rows, or two blocks, in one byte have no place there."""
    return weight.block % 2 == 0 and weight.shape[1] % 2 == 0 and all(each.is_contiguous() for each in weight.tensors)


def laid_out(weight: PairCodes) -> LaidOutPairs:
    """The weight as C++ reads it."""
    scales = weight.scales
    pointers = [address(each) for each in (weight.codes, scales.numbers, scales.codes, scales.levels, weight.levels)]
    return LaidOutPairs(*pointers, scales.group, weight.block, 0.0 if scales.mean is None else float(scales.mean))


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor lies. Raises RecipeError for one that lies nowhere."""
    return None if tensor is None else tensor.data_ptr() or nowhere(tensor)
