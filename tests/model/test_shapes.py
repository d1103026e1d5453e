"""Tensors wear their shapes, and a call that does not fit them fails wherever these are checked."""

from __future__ import annotations

import jaxtyping
import pytest
import torch

from luthier.kernels.torch_backend import TorchBackend


def call(width: int) -> None:
    TorchBackend().norm(torch.ones(3, 4), torch.ones(width), 1e-6)


def test_a_shape_that_does_not_fit_is_refused() -> None:
    """Breaks when the suite checks no shapes: the plugin is gone, or switched off."""
    call(4)
    with pytest.raises(jaxtyping.TypeCheckError, match="norm"):
        call(5)
