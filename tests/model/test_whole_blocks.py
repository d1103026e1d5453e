"""Blocks that are laid out for one call: never used when something of the model is not as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from luthier.adapters.ia3 import IA3
from luthier.infer.engine import Engine
from luthier.infer.request import Request
from luthier.kernels.backend import Backend
from luthier.kernels.native_backend import NativeBackend
from luthier.kernels.native_tokens import NativeTokenBlocks
from luthier.model.language_model import LanguageModel
from luthier.model.packed import PackedWeight, Packing
from luthier.model.packing import pack_weights
from luthier.model.speaker import Sampling
from luthier.quantizers import Quantizer
from luthier.quantizers.int8 import RowInt8
from luthier.quantizers.nf4 import NF4
from tests import forests


@pytest.fixture
def model() -> LanguageModel:
    made = forests.language_model("llama")
    if made.executor.backend.name != "native":
        pytest.skip("only the C++ has whole blocks")
    return made


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """How often blocks were laid out, and which went in one call."""
    seen: dict[str, list[Any]] = {"laid": [], "through": []}
    lay, through = NativeBackend.token_blocks, NativeTokenBlocks.through

    def laid(self: NativeBackend, blocks: Any) -> Any:
        seen["laid"].append(len(blocks))
        return lay(self, blocks)

    def gone(self: NativeTokenBlocks, x: Any, which: range, *more: Any) -> Any:
        found = through(self, x, which, *more)
        seen["through"].append((which.start, which.stop, found is not None))
        return found

    monkeypatch.setattr(NativeBackend, "token_blocks", laid)
    monkeypatch.setattr(NativeTokenBlocks, "through", gone)
    return seen


def said(model: LanguageModel, tokens: int = 4) -> torch.Tensor:
    """Log-probabilities of what a new engine says."""
    engine = Engine(model)
    engine.add(Request(prompt=forests.tokens(np.random.default_rng(1), 40), sampling=Sampling(max_new_tokens=tokens)))
    told = []
    while engine.busy:
        told += [each.log_prob for news in engine.step() for each in news.said]
    return torch.tensor(told)


def by_operations(model: LanguageModel) -> torch.Tensor:
    """The same with no block in one call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NativeTokenBlocks, "through", lambda *given: None)
        return said(model)


def present(packing: Packing | None) -> Packing:
    assert packing is not None
    return packing


def layer_of(model: LanguageModel) -> Any:
    return model.module.base_model.get_submodule("layers")[1]


def in_place(layer: Any) -> None:
    layer.mlp.up_proj.weight.mul_(1.5)


def moved(layer: Any) -> None:
    layer.self_attn.q_proj.weight.data = layer.self_attn.q_proj.weight.data * 1.5


def norm_moved(layer: Any) -> None:
    layer.post_attention_layernorm.weight.data = layer.post_attention_layernorm.weight.data * 1.5


def another_parameter(layer: Any) -> None:
    layer.mlp.gate_proj.weight = nn.Parameter(layer.mlp.gate_proj.weight * 1.5)


def another_module(layer: Any) -> None:
    made = nn.Linear(layer.mlp.down_proj.in_features, layer.mlp.down_proj.out_features, bias=False)
    made.weight.data = layer.mlp.down_proj.weight.data * 1.5
    layer.mlp.down_proj = made


@pytest.mark.parametrize("change", [in_place, moved, norm_moved, another_parameter, another_module])
@torch.no_grad()
def test_a_change_of_the_model_is_heard_at_once(
    model: LanguageModel, calls: dict[str, list[Any]], change: Callable[[Any], None]
) -> None:
    """Breaks when the C++ goes on with weights that are not the model's any more, or lays them out at every token."""
    before = said(model)
    assert calls["laid"] == [model.sites.layers] and all(fine for *_, fine in calls["through"][-3:])
    change(layer_of(model))
    after = said(model)
    assert len(calls["laid"]) == (1 if change is in_place else 2)
    assert torch.equal(after, by_operations(model)) and not torch.allclose(after, before)


def with_hook(layer: Any, seen: list[int]) -> Callable[[], None]:
    return layer.mlp.up_proj.register_forward_hook(lambda *_: seen.append(1)).remove  # type: ignore[no-any-return]


def with_forward(layer: Any, seen: list[int]) -> Callable[[], None]:
    module, own = layer.self_attn, layer.self_attn.forward

    def forward(*given: Any, **named: Any) -> Any:
        seen.append(1)
        return own(*given, **named)

    module.forward = forward
    return lambda: delattr(module, "forward")


@pytest.mark.parametrize("put", [with_hook, with_forward])
@torch.no_grad()
def test_who_watches_a_module_sees_it_called_and_is_missed_at_once(
    model: LanguageModel, calls: dict[str, list[Any]], put: Callable[[Any, list[int]], Callable[[], None]]
) -> None:
    """Breaks when a hook is passed over because blocks go in one call, or they go one by one for ever after."""
    seen: list[int] = []
    before = said(model)
    take_off = put(layer_of(model), seen)
    calls["through"].clear()
    after = said(model)
    times = len(seen)
    assert times >= 4 and not calls["through"]
    assert torch.allclose(after, before, atol=1e-5)
    take_off()
    assert torch.equal(said(model), before) and len(seen) == times and all(fine for *_, fine in calls["through"][-3:])


@torch.no_grad()
def test_the_blocks_around_one_that_is_edited_still_go_in_one_call(
    model: LanguageModel, calls: dict[str, list[Any]]
) -> None:
    """Breaks when an edit that is no low-rank term is passed over, or slows blocks that it is not on."""
    before, layers = said(model), model.sites.layers
    edits = [edit for edit in IA3().attach(model.sites) if "layers.1." in edit.site_name]
    attachment = model.attach(edits)
    forests.shake(attachment.named_parameters().values(), seed=3)
    calls["through"].clear()
    after = said(model)
    assert {(start, stop) for start, stop, fine in calls["through"] if fine} == (
        {(0, 1), (2, layers)} if layers > 2 else {(0, 1)}
    )
    assert torch.equal(after, by_operations(model)) and not torch.allclose(after, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("quantizer", [RowInt8(), NF4(), NF4(double=False, block=32)])
@torch.no_grad()
def test_weights_in_fewer_bits_go_in_one_call_too(
    quantizer: Quantizer, mixed: bool, dtype: torch.dtype, calls: dict[str, list[Any]]
) -> None:
    """Breaks when layers of one input are given each other's codes or scales, a bias is lost, or one that is not
    packed, or is in another way, is taken for packed as its neighbours are."""
    model = forests.language_model("qwen2")
    backend = model.executor.backend
    if backend.name != "native":
        pytest.skip("only the C++ has whole blocks")
    model.module.to(dtype)
    pack_weights(model, lambda weight: present(quantizer.pack(weight, backend)))
    if mixed:
        layer = layer_of(model)
        plain = layer.self_attn.k_proj.weight.matrix() * 1.5
        layer.self_attn.k_proj.weight = nn.Parameter(plain, requires_grad=False)
        other: Quantizer = NF4() if isinstance(quantizer, RowInt8) else RowInt8()
        for own in (layer.self_attn.v_proj, layer.mlp.gate_proj):
            own.weight = packed_by(other, own.weight.matrix() * 1.5, backend)
    after = said(model)
    assert all(fine for *_, fine in calls["through"][-3:])
    assert torch.equal(after, by_operations(model))


def packed_by(quantizer: Quantizer, matrix: torch.Tensor, backend: Backend) -> nn.Parameter:
    def pack(weight: torch.Tensor) -> Packing:
        return present(quantizer.pack(weight, backend))

    return nn.Parameter(PackedWeight(pack(matrix), matrix.dtype, pack), requires_grad=False)


@torch.no_grad()
def test_codes_of_four_bits_that_are_changed_are_heard_at_once(
    model: LanguageModel, calls: dict[str, list[Any]]
) -> None:
    """Breaks when the C++ goes on with codes, or with scales of them, that are not the model's any more."""
    backend = model.executor.backend
    pack_weights(model, lambda weight: present(NF4().pack(weight, backend)))
    before = said(model)
    own = layer_of(model).mlp.up_proj
    own.weight = packed_by(NF4(), own.weight.matrix() * 1.5, backend)
    after = said(model)
    assert len(calls["laid"]) == 2
    assert torch.equal(after, by_operations(model)) and not torch.allclose(after, before)
