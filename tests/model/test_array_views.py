"""Tensors as arrays and back: the same memory, every type, every shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from luthier.model.files.array_files import DTYPES
from luthier.model.files.array_views import array_of, array_type, tensor_of, tensor_type


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (0, 4), (2, 3, 5)])
def test_both_are_views_of_the_same_numbers(name: str, shape: tuple[int, ...]) -> None:
    """Breaks when something is copied, a type is another, or a shape is lost."""
    dtype = tensor_type(DTYPES[name])
    assert array_type(dtype) == DTYPES[name] and str(dtype) == f"torch.{DTYPES[name].name}"
    tensor = torch.ones(shape, dtype=torch.uint8).to(dtype)
    array = array_of(tensor)
    assert array.dtype == DTYPES[name] and array.shape == shape
    back = tensor_of(array)
    assert back.dtype == dtype and back.shape == shape and back.data_ptr() == tensor.data_ptr()
    if tensor.numel():
        array.reshape(-1).view(np.uint8)[:] = 0
        assert not back.reshape(-1).view(torch.uint8).any()


def test_rows_that_do_not_lie_in_order_are_still_views() -> None:
    """Breaks when a turned matrix is copied, or a weight that is trained cannot be written."""
    tensor = torch.randn(4, 6, requires_grad=True).to(torch.bfloat16)
    array = array_of(tensor.t())
    assert array.shape == (6, 4) and np.array_equal(array.astype(np.float32), tensor.detach().t().float().numpy())
    assert np.shares_memory(array.view(np.int16), array_of(tensor).view(np.int16))
