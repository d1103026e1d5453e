"""Addresses of tensors for C++, which reads whatever is there: a tensor whose numbers lie nowhere is refused."""

from __future__ import annotations

from torch import Tensor

from luthier.core.errors import RecipeError


def nowhere(tensor: Tensor) -> int:
    """The address 0 of a tensor without numbers, for `tensor.data_ptr() or nowhere(tensor)`.

    Raises RecipeError where there are numbers, and they have no place: on torch's meta device.
    """
    if tensor.numel():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise RecipeError(
            f"a {kind} tensor of shape {tuple(tensor.shape)} on the device {tensor.device}, whose numbers lie nowhere",
            allowed="tensors with numbers",
            do="load the weights before the model computes; LUTHIER_KERNELS=torch computes shapes alone",
        )
    return 0
