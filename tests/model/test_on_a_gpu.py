"""What only a GPU can tell: that torch's operations and compiled kernels do there what their stand-ins do on a CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from luthier.kernels import varlen
from luthier.model.attending import block_mask as by
from luthier.model.attending.block_mask import MaskedAttention, MaskedCall
from luthier.model.language_model import LanguageModel
from tests import forests
from tests.model.test_block_mask import dense, spans

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
CUDA = torch.device("cuda")


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "gemma2", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_has_the_losses_and_gradients_of_the_zoo(architecture: str, dtype: torch.dtype) -> None:
    """Breaks when kernels, flash attention or attention by mask differ from the zoo's modules on this GPU."""
    trees = [forests.branching(), *forests.rows(6)]
    found = []
    for kernels in ("auto", "torch"):
        module = forests.zoo(architecture, dtype=dtype).to(CUDA)
        model = LanguageModel(module, source="tiny", digest="", kernels=kernels)
        assert model.executor.kind == "segments" and not any("not by mask" in notice for notice in model.notices)
        parameters = forests.trainable(model)
        loss = forests.engine_loss(model, trees)
        found.append((loss.item(), forests.gradients(loss, parameters)))
    share = 1e-4 if dtype == torch.float32 else 5e-2
    assert found[0][0] == pytest.approx(found[1][0], rel=share)
    forests.assert_same_gradients(found[0][1], found[1][1], tolerance=share)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("outside", [0, 5])
def test_attention_by_mask(outside: int, window: int | None) -> None:
    """Breaks when the lists of blocks for the backward pass are not what FlexAttention takes them for."""
    laid = spans(1, times=30)
    count = laid[-1].stop
    generator = torch.Generator().manual_seed(0)
    sizes = ((4, count), (2, outside + count), (2, outside + count))
    given = [torch.randn(1, heads, n, 64, generator=generator).to(CUDA).requires_grad_() for heads, n in sizes]
    mask = dense(laid, outside, window).to(CUDA)
    expected = F.scaled_dot_product_attention(*given, attn_mask=mask, enable_gqa=True)
    call = MaskedCall(*given, by.block_mask(laid, outside, window, CUDA), None, None)
    found = MaskedAttention.compiled().attend(call)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    upper = torch.randn(expected.shape, generator=generator).to(CUDA)
    slopes = [torch.autograd.grad(out, given, upper) for out in (found, expected)]
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_flash_attention_takes_ordinary_heads() -> None:
    """Breaks when attention of a common model goes the general way without a word."""
    assert varlen.allowed(torch.empty(3, 8, 128, dtype=torch.bfloat16, device=CUDA))
