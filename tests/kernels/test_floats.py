"""Types of real numbers beside torch: what is wide, how is it rounded, and which types are real."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from luthier.kernels.floats import BFLOAT16, FLOAT32, REAL, is_real, narrowed, smallest, step, widened
from tests.kernels.test_vectors import every_upper_half


def tensor(array: np.ndarray) -> torch.Tensor:
    """The same bits as torch's."""
    dtype: torch.dtype = getattr(torch, array.dtype.name)
    return torch.frombuffer(bytearray(array.tobytes()), dtype=dtype).view(array.shape)


@pytest.mark.parametrize("name", REAL)
def test_numbers_are_rounded_and_widened_as_torch_does(name: str) -> None:
    """Breaks when ties go up, a number that is none becomes one, or a type is taken for another."""
    dtype, given = REAL[name], every_upper_half().reshape(5, -1)
    known: torch.dtype = getattr(torch, name)
    if dtype.itemsize == 1:
        # What is too large for eight bits differs between libraries.
        given = given[np.abs(given) < 400].reshape(2, -1)
    found, wanted = narrowed(given, dtype), tensor(given).to(known)
    assert found.dtype == dtype and found.shape == given.shape
    torch.testing.assert_close(tensor(found).float(), wanted.float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(tensor(widened(found)), wanted.float(), rtol=0, atol=0, equal_nan=True)
    assert step(dtype) == torch.finfo(known).eps and smallest(dtype) == torch.finfo(known).tiny


def test_what_has_the_type_is_not_copied_and_no_shape_is_lost() -> None:
    """Breaks when a pass over memory is spent on nothing, or rows that do not lie in order are read in another."""
    given = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert widened(given) is given and narrowed(given, FLOAT32) is given
    turned = narrowed(given.T, BFLOAT16)
    assert np.array_equal(widened(turned), given.T) and np.array_equal(widened(turned.T), given)
    assert widened(narrowed(np.full((), 3, np.float32), BFLOAT16)) == 3


def test_whole_numbers_truth_values_and_complex_ones_are_not_real() -> None:
    """Breaks when an index is merged, or a weight of eight bits copied."""
    assert all(is_real(dtype) for dtype in REAL.values())
    assert not any(is_real(np.dtype(kind)) for kind in (np.int64, np.uint8, np.bool_, np.complex64))
