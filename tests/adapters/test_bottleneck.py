"""Bottleneck adapters: the equation at each place, and what they cannot do."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.adapters.bottleneck import Bottleneck, Narrow
from luthier.adapters.lora import LoRA
from luthier.core.errors import RecipeError
from luthier.model.language_model import LanguageModel
from tests import forests

IDS = np.array([5, 17, 90, 3, 44, 71], dtype=np.int32)
Preset = Literal["houlsby", "pfeiffer", "parallel"]


def moved(preset: Preset, architecture: str = "llama", **knobs: Any) -> tuple[LanguageModel, Bottleneck]:
    model = forests.language_model(architecture)
    method = Bottleneck(preset=preset, size=6, **knobs)
    attachment = model.attach(method.attach(model.sites))
    forests.shake(attachment.named_parameters().values())
    return model, method


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("preset", ["houlsby", "pfeiffer", "parallel"])
def test_it_is_the_equation_at_each_place(preset: Preset, architecture: str, activation: Any) -> None:
    """Breaks when it reads the input for the output, stands behind the residual sum, or forgets bias or scale."""
    model, _ = moved(preset, architecture, activation=activation, scale=2.5)
    found = forests.logits(model, IDS)
    edits = [edit for edit in model.attachments["default"].edits if isinstance(edit, Narrow)]
    bends = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}
    plain = forests.zoo(architecture, ours=False)

    def hook(edit: Narrow) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            seen = inputs[0] if preset == "parallel" else output
            return output + 2.5 * edit.up(bends[activation](edit.down(seen)))

        return add

    for edit in edits:
        plain.get_submodule(edit.site_name).register_forward_hook(hook(edit))
    expected = plain(input_ids=torch.from_numpy(IDS.astype(np.int64))[None]).logits[0].detach()
    assert len(edits) == (4 if preset == "houlsby" else 2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_second_adapter_inside_a_parallel_one_works_and_comes_off() -> None:
    """Breaks when a wrapped feed-forward hides its layers from another adapter."""
    model = forests.language_model("llama")
    before = forests.snapshot(model.module)
    forests.shake(model.attach(Bottleneck(preset="parallel").attach(model.sites)).named_parameters().values())
    alone = forests.logits(model, IDS)
    inside = model.attach(LoRA(rank=2, targets=("gate", "down")).attach(model.sites), name="inside")
    assert torch.equal(forests.logits(model, IDS), alone)
    forests.shake(inside.named_parameters().values(), seed=5)
    assert not torch.equal(forests.logits(model, IDS), alone)
    model.switch("default", on=False)
    fused = forests.logits(model, IDS)
    model.detach("default")
    assert torch.equal(forests.logits(model, IDS), fused)
    model.detach("inside")
    assert forests.snapshot(model.module) == before


def test_the_start_and_the_file() -> None:
    """Breaks when the spread of the start is not read, or a preset comes back as another."""
    model = forests.language_model("llama")
    (edit, *_) = Bottleneck(size=200, init_std=0.02).attach(model.sites)
    assert isinstance(edit, Narrow)
    for matrix in (edit.down.weight, edit.up.weight):
        assert float(matrix.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert not edit.up.bias.any() and not edit.down.bias.any()
    for preset in ("houlsby", "pfeiffer", "parallel"):
        method = Bottleneck(preset=preset, size=3, activation="tanh", scale=4.0)
        assert Bottleneck.from_peft(method.peft_config(model.sites)) == method
    with pytest.raises(RecipeError, match="bottleneck file is a 'lora'"):
        Bottleneck.from_peft({**method.peft_config(model.sites), "architecture": "lora"})
