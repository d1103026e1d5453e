"""int8: the equation, row by row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from luthier.adapters.lora import LoRA
from luthier.kernels.torch_backend import TorchBackend
from luthier.model.packing import pack_weights
from luthier.quantizers.int8 import EXACT, Int8Packing, RowInt8, whole_product
from tests import forests

IDS = np.array([5, 17, 90, 3, 44, 71, 8, 8, 120], dtype=np.int32)


def packing(weight: Tensor, threshold: float | None) -> Int8Packing:
    found = RowInt8(outlier_threshold=threshold).pack(weight, TorchBackend())
    assert isinstance(found, Int8Packing)
    return found


def activations(tokens: int, inputs: int) -> Tensor:
    """Normal numbers, and a few features that are far above them in some tokens; exact in half precision."""
    made = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(1))
    made[:: 3, 5] = 20.0
    made[1, inputs // 2] = -9.5
    made[-1] = 0
    return made.half().float()


def by_hand(x: Tensor, held: Int8Packing, threshold: float) -> Tensor:
    """LLM.int8() in float64, number by number as the paper writes it."""
    weights = held.codes.double() * held.scales.double()[:, None]
    outliers = sorted({int(column) for _, column in (x.abs() >= threshold).nonzero()})
    found = torch.zeros(len(x), len(weights), dtype=torch.float64)
    for token, row in enumerate(x.double()):
        below = [value for value in row.tolist() if abs(value) < threshold]
        step = max(map(abs, below), default=0.0) / 127
        for column, value in enumerate(row.tolist()):
            if column in outliers:
                found[token] += value * weights[:, column]
            elif step:
                found[token] += step * round(value / step) * weights[:, column]
    return found


def test_each_row_has_its_scale_and_errors_of_half_a_step() -> None:
    """Breaks when one scale serves the matrix, or codes reach -128."""
    weight = torch.randn(9, 40, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-4, 5)[:, None]
    found = RowInt8().pack(weight, TorchBackend())
    assert isinstance(found, Int8Packing)
    assert torch.equal(found.scales, weight.abs().amax(1) / 127)
    assert found.codes.abs().max() == 127 and int(found.codes.min()) >= -127
    error = (found.dense(torch.float32) - weight).abs()
    assert bool((error <= found.scales[:, None] * 0.5001).all())


@pytest.mark.parametrize(("tokens", "shape"), [(7, (12, 40)), (1, (5, 33)), (9, (1, 16))])
def test_llm_int8_is_its_formula(tokens: int, shape: tuple[int, int]) -> None:
    """Breaks when an outlier takes the scale of its token, a column is counted twice, or a token of zeros divides."""
    x = activations(max(tokens, 2), shape[1])[:tokens]
    held = packing(torch.randn(*shape, generator=torch.Generator().manual_seed(2)), 6.0)
    found = held.product(x)
    assert found is not None
    torch.testing.assert_close(found.double(), by_hand(x, held, 6.0), rtol=1e-5, atol=1e-5)
    rounded = held.product(x.bfloat16())
    assert rounded is not None and rounded.dtype == torch.bfloat16
    assert packing(held.dense(torch.float32), None).product(x) is None


@pytest.mark.parametrize("tokens", [1, 6])
def test_llm_int8_is_that_of_bitsandbytes(tokens: int) -> None:
    """Breaks when outliers are chosen, or scaled, in another way than inference will."""
    bitsandbytes: Any = pytest.importorskip("bitsandbytes", reason="bitsandbytes is the oracle")
    weight = (torch.randn(24, 48, generator=torch.Generator().manual_seed(3)) * 0.1).half().float()
    x, bias = activations(6, 48)[:tokens], torch.randn(24).half().float()
    theirs = bitsandbytes.nn.Linear8bitLt(48, 24, has_fp16_weights=False, threshold=6.0)
    theirs.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    theirs.bias = torch.nn.Parameter(bias)
    theirs = theirs.to("cpu").eval()
    held = packing(weight, 6.0)
    seen = x.clone().requires_grad_()
    expected = theirs(seen)
    found = held.product(x)
    assert found is not None
    # Their float32 constant for 1 / 127^2 is 1.8e-5 too large, and their scales go through half precision.
    torch.testing.assert_close(found + bias, expected, rtol=2e-3, atol=2e-3)
    expected.sum().backward()
    assert seen.grad is not None
    ours = torch.ones(tokens, 24) @ held.dense(torch.float32)
    torch.testing.assert_close(ours, seen.grad, rtol=2e-3, atol=2e-3)


def test_the_decomposition_is_what_saves_outliers() -> None:
    """Breaks when outliers are rounded with the rest: their scale then takes the rest away."""
    x, weight = activations(64, 96), torch.randn(32, 96, generator=torch.Generator().manual_seed(4))
    exact = x @ weight.t()

    def error(threshold: float) -> float:
        found = packing(weight, threshold).product(x)
        assert found is not None
        return float((found - exact).norm() / exact.norm())

    assert error(6.0) < 0.012 < 0.015 < error(1000.0)


def test_products_of_whole_numbers_are_exact() -> None:
    """Breaks when a sum is rounded before it is whole."""
    left = torch.full((3, 3 * EXACT + 7), 127, dtype=torch.int8)
    right = torch.full((2, 3 * EXACT + 7), -127, dtype=torch.int8)
    assert whole_product(left, right).unique().tolist() == [float(torch.tensor(-127.0 * 127 * (3 * EXACT + 7)))]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_a_model_computes_every_product_so_and_its_gradient_as_before(architecture: str, fused: bool) -> None:
    """Breaks when a product goes round it, a bias is lost, or rounding stops the gradient."""
    low, plain = (forests.language_model(architecture, fused=fused) for _ in range(2))
    for model, threshold in ((low, 1.0), (plain, None)):
        method = RowInt8(outlier_threshold=threshold)

        def pack(weight: Tensor, method: RowInt8 = method) -> Int8Packing:
            found = method.pack(weight, TorchBackend())
            assert isinstance(found, Int8Packing)
            return found

        pack_weights(model, pack)
    expected = forests.logits(plain, IDS)
    assert 1e-4 < forests.relative_error(forests.logits(low, IDS), expected) < 0.1
    seen: list[tuple[int, int]] = []
    product = Int8Packing.product

    def counted(self: Int8Packing, x: Tensor) -> Tensor | None:
        seen.append(self.shape)
        return product(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Int8Packing, "product", counted)
        forests.logits(low, IDS)
        alone = len(seen)
        loss = forests.engine_loss(low, forests.rows(2))
    layers = len([site for site in low.sites.linear() if site.layer is not None])
    assert alone == layers and len(seen) - alone >= layers and bool(loss.isfinite())
    gradients = []
    for model in (low, plain):
        torch.manual_seed(7)
        attachment = model.attach(LoRA(rank=4).attach(model.sites))
        forests.shake(attachment.named_parameters().values())
        found = forests.gradients(forests.engine_loss(model, forests.rows(3)), attachment.named_parameters())
        gradients.append(torch.cat([each.flatten() for each in found.values()]))
    assert 1e-4 < float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < 0.2
