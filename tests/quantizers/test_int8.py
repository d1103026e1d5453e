"""int8: the equation, row by row."""

from __future__ import annotations

import torch

from luthier.kernels.torch_backend import TorchBackend
from luthier.quantizers.int8 import Int8Packing, RowInt8


def test_each_row_has_its_scale_and_errors_of_half_a_step() -> None:
    """Breaks when one scale serves the matrix, or codes reach -128."""
    weight = torch.randn(9, 40, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-4, 5)[:, None]
    found = RowInt8().pack(weight, TorchBackend())
    assert isinstance(found, Int8Packing)
    assert torch.equal(found.scales, weight.abs().amax(1) / 127)
    assert found.codes.abs().max() == 127 and int(found.codes.min()) >= -127
    error = (found.dense(torch.float32) - weight).abs()
    assert bool((error <= found.scales[:, None] * 0.5001).all())
