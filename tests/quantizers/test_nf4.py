"""NF4: bit for bit what bitsandbytes makes, and the bytes of its card."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from luthier.kernels.torch_backend import TorchBackend
from luthier.maths import codebooks
from luthier.quantizers.nf4 import NF4, NF4Packing, nf4_codes

bitsandbytes: Any = pytest.importorskip("bitsandbytes", reason="bitsandbytes is the oracle")
SHAPES = [(48, 64), (100, 33), (7, 5), (1, 1), (64, 64), (3, 1000)]


def weight(shape: tuple[int, int], *, zeros: bool = False) -> torch.Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0])) * 0.05
    if zeros:
        made.view(-1)[: 2 * made.numel() // 3] = 0
    return made


def packing(method: NF4, matrix: torch.Tensor) -> NF4Packing:
    found = method.pack(matrix, TorchBackend())
    assert isinstance(found, NF4Packing)
    return found


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_scales_are_those_of_bitsandbytes(shape: tuple[int, int], block: Any, zeros: bool) -> None:
    """Breaks when a tie, a ragged block, the order of halves, or the reciprocal is another."""
    matrix = weight(shape, zeros=zeros)
    theirs, state = bitsandbytes.functional.quantize_4bit(
        matrix, blocksize=block, quant_type="nf4", compress_statistics=False
    )
    ours = packing(NF4(block=block, double=False), matrix)
    assert ours.scales is not None
    assert torch.equal(ours.codes, theirs.view(-1)) and torch.equal(ours.scales, state.absmax)
    codes = torch.stack([theirs.view(-1) >> 4, theirs.view(-1) & 15], 1).view(-1)[: matrix.numel()]
    by_hand = torch.tensor(codebooks.NF4)[codes.int()] * state.absmax.repeat_interleave(block)[: matrix.numel()]
    assert torch.equal(ours.dense(torch.float32).view(-1), by_hand)
    for dtype in (torch.float32, torch.bfloat16) if block == 64 else ():
        # On a CPU bitsandbytes 0.50.2 counts blocks from the beginning of each row: right are rows of whole blocks, and
        # odd ones, for which it takes another way.
        state.dtype = dtype
        expected = bitsandbytes.functional.dequantize_4bit(theirs, state).to(dtype)
        torch.testing.assert_close(ours.dense(dtype), expected.view(shape), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(64, 640), (100, 333)])
def test_double_quantization_is_as_near_as_theirs(shape: tuple[int, int]) -> None:
    """Breaks when the mean is lost, or groups of scales are of another size."""
    matrix = weight(shape)
    _, state = bitsandbytes.functional.quantize_4bit(matrix, blocksize=64, quant_type="nf4", compress_statistics=True)
    ours = packing(NF4(), matrix)
    exact = nf4_codes(matrix.reshape(-1), 64)[1]
    assert ours.scale_mean is not None and ours.scale_scales is not None and ours.scale_codes is not None
    assert float(ours.scale_mean) == float(state.offset)
    assert torch.equal(ours.scale_scales, state.state2.absmax)
    # On a CPU bitsandbytes rounds to one of 65,536 places first; ours is the nearest level there is.
    theirs = bitsandbytes.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    bound = 3.1e-5 * ours.scale_scales.repeat_interleave(256)[: len(exact)]
    assert bool(((ours.block_scales() - exact).abs() <= (theirs - exact).abs() + bound).all())
    assert int((ours.scale_codes.int() - state.absmax.int()).abs().max()) <= 1


def test_a_parameter_takes_4_127_bits() -> None:
    """Breaks when a tensor is kept that the card does not count."""
    method, shape = NF4(), (512, 2048)
    ours = packing(method, weight(shape))
    assert ours.nbytes == method.packed_bytes(shape)
    assert 8 * ours.nbytes / (shape[0] * shape[1]) == pytest.approx(4.127, abs=5e-4)
    plain = NF4(double=False)
    assert 8 * packing(plain, weight(shape)).nbytes / (shape[0] * shape[1]) == 4.5


def test_the_error_is_at_most_half_a_gap() -> None:
    """Breaks when a level is taken that is not the nearest."""
    matrix = weight((64, 64))
    ours = packing(NF4(double=False), matrix)
    assert ours.scales is not None
    levels = torch.tensor(codebooks.NF4)
    gap = float((levels[1:] - levels[:-1]).max()) / 2
    error = (ours.dense(torch.float32) - matrix).view(-1, 64).abs().amax(1)
    assert bool((error <= ours.scales * gap * 1.0001).all())
