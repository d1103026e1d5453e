"""What every quantizer of the catalog promises, under every adapter that does not train the base."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from luthier.adapters import Adapter
from luthier.core import catalog
from luthier.core.chosen import choose
from luthier.kernels.native_backend import NativeBackend
from luthier.kernels.torch_backend import TorchBackend
from luthier.model.language_model import LanguageModel
from luthier.model.packed import PackedWeight, Packing, stored_bytes
from luthier.model.packing import pack_weights, unpack_weights
from luthier.quantizers import Quantizer
from tests import forests

ALL = [choose("quantizers", Quantizer, name) for name in catalog.names("quantizers")]
PACKING = [method for method in ALL if "packed-weights" in method.provides]
ADAPTERS = [
    name for name in catalog.names("adapters") if "trains-base" not in catalog.load("adapters", name).provides
]
MERGEABLE = [name for name in ADAPTERS if "mergeable" in catalog.load("adapters", name).provides]
BACKEND = TorchBackend()
MODELS = ("llama", "gpt2")
IDS = np.array([5, 17, 90, 3, 44, 71, 8, 8, 120], dtype=np.int32)
each = pytest.mark.parametrize("method", PACKING, ids=lambda method: method.method_name())


def under(names: Sequence[str]) -> pytest.MarkDecorator:
    """Every quantizer under every adapter on both models: in each test run on one of them, in turn."""
    return pytest.mark.parametrize(
        ("method", "name", "architecture"),
        [
            pytest.param(method, name, model, id=f"{method.method_name()}-{name}-{model}",
                         marks=() if model == MODELS[(one + two) % 2] else pytest.mark.slow)
            for one, method in enumerate(PACKING) for two, name in enumerate(names) for model in MODELS
        ],
    )  # fmt: skip


def packed(method: Quantizer, weight: torch.Tensor) -> Packing:
    found = method.pack(weight, BACKEND)
    assert found is not None
    return found


def models(method: Quantizer, architecture: str) -> tuple[LanguageModel, LanguageModel]:
    """A model whose weights are packed, and one whose weights are what those unpack to."""
    quantized, plain = forests.language_model(architecture), forests.language_model(architecture)
    pack_weights(quantized, lambda weight: packed(method, weight))
    with torch.no_grad():
        for site in plain.sites.linear():
            if site.layer is not None:
                dense = packed(method, site.weight()).dense(torch.float32)
                site.weight_parameter.copy_(dense.t() if site.transposed else dense)
    return quantized, plain


@pytest.mark.parametrize("method", ALL, ids=lambda method: method.method_name())
@pytest.mark.parametrize("shape", [(24, 40), (5, 6), (64, 130)])
def test_declared_bytes_are_the_bytes_of_its_tensors(method: Quantizer, shape: tuple[int, int]) -> None:
    """Breaks when a scale is not counted, or padding is kept."""
    found = method.pack(torch.randn(*shape), BACKEND)
    assert (found is None) == ("packed-weights" not in method.provides)
    assert method.packed_bytes(shape) == (None if found is None else found.nbytes)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_comes_back_is_near_and_has_its_shape(method: Quantizer, dtype: torch.dtype) -> None:
    """Breaks when rows and columns are exchanged, or a scale belongs to another block."""
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 2, 48)[:, None]
    found = packed(method, weight.to(dtype)).dense(dtype)
    assert found.shape == weight.shape and found.dtype == dtype
    bound = {"int8": 0.01, "nf4": 0.12, "int4_group": 0.13, "ternary": 0.65}[method.method_name()]
    assert float((found.float() - weight).norm() / weight.norm()) < bound
    again = packed(method, found).dense(dtype)
    assert float((again.float() - found.float()).norm() / found.float().norm()) < bound


@each
def test_zeros_and_one_number_survive(method: Quantizer) -> None:
    """Breaks when a block without a range divides by nothing."""
    assert not packed(method, torch.zeros(8, 12)).dense(torch.float32).any()
    constant = packed(method, torch.full((8, 12), 0.25)).dense(torch.float32)
    torch.testing.assert_close(constant, torch.full((8, 12), 0.25), rtol=2e-2, atol=0)


@each
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "mistral"])
def test_a_packed_model_is_the_model_of_its_unpacked_weights(method: Quantizer, architecture: str) -> None:
    """Breaks when a bias is lost, a transposed weight is turned twice, or the fused path reads something else."""
    quantized, plain = models(method, architecture)
    torch.testing.assert_close(forests.logits(quantized, IDS), forests.logits(plain, IDS), rtol=1e-5, atol=1e-5)
    trees = [forests.branching(seed=1), *forests.rows(3)]
    ours, theirs = forests.engine_loss(quantized, trees), forests.engine_loss(plain, trees)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(24, 40), (130, 192)])
def test_a_few_rows_are_multiplied_as_many_are(
    method: Quantizer, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    """Breaks when what multiplies packed weights as they are reads them otherwise than what unpacks them, or stops a
    gradient."""
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 2, shape[0])[:, None]
    held = method.pack(weight.to(dtype), NativeBackend.build())
    assert held is not None
    dense, parameter = held.dense(torch.float32), PackedWeight(held, dtype, lambda _: held)
    slack = 1e-5 if dtype == torch.float32 else 2e-2
    for rows in (1, 3, 32, 33):
        x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows)).to(dtype).requires_grad_()
        found = torch.nn.functional.linear(x, parameter)
        expected = x.detach().float() @ dense.t()
        assert float((found.detach().float() - expected).norm() / expected.norm()) < slack
        found.sum().backward()
        assert x.grad is not None
        slope = dense.sum(0).expand(rows, -1)
        assert float((x.grad.float() - slope).norm() / slope.norm()) < slack


@under(ADAPTERS)
def test_adapters_train_on_it_as_on_the_unpacked_weights(method: Quantizer, name: str, architecture: str) -> None:
    """Breaks when a gradient stops at a packed weight, or an adapter sees codes for numbers."""
    found = []
    for model in models(method, architecture):
        torch.manual_seed(7)
        attachment = model.attach(choose("adapters", Adapter, name).attach(model.sites))
        forests.shake(attachment.named_parameters().values())
        loss = forests.engine_loss(model, [forests.branching(seed=1), *forests.rows(3)])
        found.append(forests.gradients(loss, attachment.named_parameters()))
    forests.assert_same_gradients(found[0], found[1], tolerance=1e-4)


@under(MERGEABLE)
def test_merging_packs_the_sum_once(method: Quantizer, name: str, architecture: str) -> None:
    """Breaks when the sum is made of rounded numbers, packed in another way, or its error is not what is told."""
    quantized, plain = models(method, architecture)
    expected = {}
    for model in (plain, quantized):
        torch.manual_seed(7)
        forests.shake(model.attach(choose("adapters", Adapter, name).attach(model.sites)).named_parameters().values())
        before = {site.name: site.weight().clone() for site in model.sites.linear()}
        rounding = model.merge()
        if model is plain:
            expected = {site.name: site.weight() for site in model.sites.linear()}
            assert rounding.error == 0 and not any(notice.startswith("merge") for notice in model.notices)
    moved = [key for key in before if not torch.equal(expected[key], before[key])]
    error, change, whole = 0.0, 0.0, 0.0
    for site in quantized.sites.linear():
        if site.name in moved:
            again = packed(method, expected[site.name]).dense(torch.float32)
            torch.testing.assert_close(site.weight(), again, rtol=1e-5, atol=1e-6)
            error += float((again - expected[site.name]).square().sum())
            change += float((expected[site.name] - before[site.name]).square().sum())
            whole += float(expected[site.name].square().sum())
    packed_sites = [site for site in quantized.sites.linear() if site.layer is not None]
    assert all(isinstance(site.weight_parameter, PackedWeight) for site in packed_sites)
    assert rounding.packed == len(moved)
    if moved:
        assert rounding.relative_error == pytest.approx((error / whole) ** 0.5, rel=1e-2)
        assert rounding.of_change == pytest.approx((error / change) ** 0.5, rel=1e-2)
        assert f"{len(moved)} weights were packed again with 'default'" in quantized.notices[-1]


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@under(MERGEABLE)
def test_a_merge_is_undone_bit_for_bit(
    method: Quantizer, name: str, architecture: str, dtype: torch.dtype
) -> None:
    """Breaks when codes are made anew by subtraction, or a weight comes back as another object."""
    model = forests.language_model(architecture, dtype=dtype)
    pack_weights(model, lambda weight: packed(method, weight))
    before = {key: (id(value), value) for key, value in model.module.named_parameters()}
    torch.manual_seed(7)
    forests.shake(model.attach(choose("adapters", Adapter, name).attach(model.sites)).named_parameters().values())
    adapted, digest = forests.logits(model, IDS), model.digest
    model.merge()
    assert model.digest != digest and not model.attachments
    model.unmerge()
    assert model.digest == digest and torch.equal(forests.logits(model, IDS), adapted)
    model.detach()
    after = dict(model.module.named_parameters())
    assert {key: id(value) for key, value in after.items()} == {key: name for key, (name, _) in before.items()}


@each
def test_unpacked_for_good_a_merge_rounds_nothing(method: Quantizer) -> None:
    """Breaks when plain weights are not the numbers that the packed ones stand for, or codes are left beside them."""
    model, _ = models(method, "gpt2")
    before = forests.logits(model, IDS)
    count = unpack_weights(model)
    assert count == 4 * model.sites.layers and torch.equal(forests.logits(model, IDS), before)
    attachment = model.attach(choose("adapters", Adapter, "lora").attach(model.sites))
    forests.shake(attachment.named_parameters().values())
    adapted = forests.logits(model, IDS)
    model.merge()
    assert forests.relative_error(forests.logits(model, IDS), adapted) <= 1e-5
    assert not any(isinstance(parameter, PackedWeight) for parameter in model.module.parameters())


@each
def test_nothing_unpacked_is_kept_for_the_backward_pass(method: Quantizer) -> None:
    """Breaks when autograd keeps the weight that a product was made with."""
    model, _ = models(method, "gpt2")
    shapes = {tuple(parameter.shape) for parameter in model.module.parameters() if isinstance(parameter, PackedWeight)}
    seen: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tensor)
        return tensor

    model.attach(choose("adapters", Adapter, "ia3").attach(model.sites))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forests.engine_loss(model, forests.rows(2))
    dense = [each for each in seen if not isinstance(each, PackedWeight) and tuple(each.shape) in shapes]
    assert not dense


@each
def test_the_packed_model_is_smaller_by_what_it_declares(method: Quantizer) -> None:
    """Breaks when a plan counts a packed weight as the tensor it looks like."""
    model = forests.language_model("llama")
    matrices = [tuple(site.weight().shape) for site in model.sites.linear() if site.layer is not None]
    before = sum(map(stored_bytes, model.module.parameters()))
    pack_weights(model, lambda weight: packed(method, weight))
    declared = sum(method.packed_bytes((rows, columns)) or 0 for rows, columns in matrices)
    after = sum(map(stored_bytes, model.module.parameters()))
    assert before - after == sum(4 * rows * columns for rows, columns in matrices) - declared
