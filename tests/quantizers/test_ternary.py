"""Ternary: absmean rounding, brute force."""

from __future__ import annotations

import pytest
import torch

from luthier.kernels.torch_backend import TorchBackend
from luthier.quantizers.ternary import Ternary


@pytest.mark.parametrize("shape", [(6, 8), (5, 7), (1, 3)])
def test_it_is_the_nearest_of_three_levels(shape: tuple[int, int]) -> None:
    """Breaks when the scale is the largest weight, or four signs come back in another order."""
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    found = Ternary().pack(weight, TorchBackend())
    assert found is not None
    scale = weight.abs().mean()
    levels = torch.tensor([-1.0, 0.0, 1.0])
    nearest = levels[(weight[..., None] / scale - levels).abs().argmin(-1)]
    torch.testing.assert_close(found.dense(torch.float32), nearest * scale, rtol=1e-6, atol=0)
