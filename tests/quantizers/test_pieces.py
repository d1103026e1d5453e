"""A matrix that is packed piece by piece, so that it never is in float32 as a whole, is packed as it was at once."""

from __future__ import annotations

import pytest
import torch

from luthier.kernels.torch_backend import TorchBackend
from luthier.quantizers import Quantizer, int8, nf4
from luthier.quantizers.int8 import RowInt8
from luthier.quantizers.nf4 import NF4


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", [(130, 33), (7, 600), (1, 1), (64, 64)])
@pytest.mark.parametrize("method", [RowInt8(), NF4(block=64), NF4(block=128, double=False)])
def test_pieces_make_the_whole(
    method: Quantizer, shape: tuple[int, int], turned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when a row or a block is cut, or the last piece is left out."""
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = weight.t().contiguous().t() if turned else weight
    at_once = method.pack(weight, TorchBackend())
    monkeypatch.setattr(int8, "PIECE", 1000)
    monkeypatch.setattr(nf4, "PIECE", 512)
    in_pieces = method.pack(weight, TorchBackend())
    assert at_once is not None and in_pieces is not None
    for name, tensor in at_once.tensors.items():
        assert torch.equal(in_pieces.tensors[name], tensor) and in_pieces.tensors[name].is_contiguous()
