"""LoRA: its equation, its scaling, its dropout, and the files it reads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from luthier.adapters.lora import LoRA, LowRank
from luthier.core.errors import RecipeError
from luthier.core.knobs import validate
from tests import forests
from tests.forests import ARCHITECTURES


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("rslora", "scale"), [(False, 8 / 4), (True, 8 / 2)])
def test_the_equation_at_every_site(architecture: str, rslora: bool, scale: float) -> None:
    """Breaks when the scale, the order of the factors or a Conv1D's orientation is wrong."""
    model = forests.language_model(architecture)
    method = LoRA(rank=4, alpha=8.0, rslora=rslora)
    assert method.scale == scale
    bases = {site.name: site.module for site in model.sites.select("all-linear")}
    attachment = model.attach(method.attach(model.sites))
    forests.shake(attachment.named_parameters().values())
    assert len(attachment.edits) == len(bases)
    for edit in attachment.edits:
        assert isinstance(edit, LowRank)
        x = torch.randn(2, 3, edit.down.shape[1])
        expected = bases[edit.site_name](x) + scale * (x @ edit.down.t() @ edit.up.t())
        found = model.module.get_submodule(edit.site_name)(x)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_start_is_a_zero_factor_beside_a_uniform_one_and_depends_on_the_seed_alone() -> None:
    """Breaks when the update does not start at zero, or the draw is not that of the reference implementation."""
    model = forests.language_model("llama")
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        edits = LoRA(rank=8).attach(model.sites)
        made.append(torch.cat([edit.get_parameter("down").flatten() for edit in edits]))
        assert all(not edit.get_parameter("up").any() for edit in edits)
        for site, edit in zip(model.sites.select("all-linear"), edits, strict=True):
            bound = 1 / math.sqrt(site.in_features)
            largest = float(edit.get_parameter("down").detach().abs().max())
            assert 0.9 * bound < largest <= bound
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_dropout_is_of_the_adapters_input_in_training_only() -> None:
    """Breaks when dropout touches the frozen path, is on in evaluation, or does not keep the expectation."""
    model = forests.language_model("llama")
    attachment = model.attach(LoRA(rank=4, dropout=0.5, targets=("q",)).attach(model.sites))
    forests.shake(attachment.named_parameters().values())
    edit = attachment.edits[0]
    module = model.module.get_submodule(edit.site_name)
    x = torch.randn(1, 32)
    plain = module(x)
    assert torch.equal(module(x), plain)
    model.train()
    torch.manual_seed(0)
    drawn = torch.cat([module(x) for _ in range(4000)]).detach()
    assert float(drawn.std(0).max()) > 0
    torch.testing.assert_close(drawn.mean(0), plain[0].detach(), rtol=0.1, atol=0.05)
    model.train(False)
    assert torch.equal(module(x), plain)


def test_factors_stay_in_float32_beside_a_bfloat16_base() -> None:
    """Breaks when small updates are kept in the precision of the base and rounded away."""
    model = forests.language_model("llama", dtype=torch.bfloat16)
    attachment = model.attach(LoRA(rank=4).attach(model.sites))
    assert {parameter.dtype for parameter in attachment.named_parameters().values()} == {torch.float32}
    forests.engine_loss(model, forests.rows(2)).backward()
    assert all(parameter.grad is not None for parameter in attachment.named_parameters().values())


def test_the_config_is_peft_s() -> None:
    """Breaks when a key is renamed, or targets select other sites than were trained."""
    model = forests.language_model("llama")
    config = LoRA(rank=4, alpha=8.0, targets=("q", "down"), rslora=True, dropout=0.1).peft_config(model.sites)
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["lora_dropout"]) == (4, 8, True, 0.1)
    assert config["target_modules"] == ["down_proj", "q_proj"]
    one = LoRA(targets=("layers.1.mlp.down_proj",)).peft_config(model.sites)
    assert one["target_modules"] == ["model.layers.1.mlp.down_proj"]
    assert LoRA().peft_config(forests.language_model("gpt2").sites)["fan_in_fan_out"] is True


def test_a_config_comes_back_as_the_same_method() -> None:
    """Breaks when a knob is lost between writing and reading."""
    sites = forests.language_model("llama").sites
    method = LoRA(rank=3, alpha=4.5, rslora=True, dropout=0.25, targets=("q_proj", "v_proj"))
    assert LoRA.from_peft(method.peft_config(sites)) == method


@pytest.mark.parametrize(
    "extra",
    [
        {"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 2}}, {"layers_to_transform": [0]}, {"exclude_modules": ["q_proj"]},
        {"lora_bias": True}, {"target_parameters": ["x"]},
    ],
)  # fmt: skip
def test_a_file_that_computes_something_else_is_refused(extra: dict[str, Any]) -> None:
    """Breaks when a setting we do not have is passed over in silence."""
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **extra}
    with pytest.raises(RecipeError, match=next(iter(extra))):
        LoRA.from_peft(config)


@pytest.mark.parametrize("knobs", [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"rnak": 4}, {"rank": 2.5}])
def test_knobs_out_of_range_are_refused(knobs: dict[str, Any]) -> None:
    """Breaks when a knob takes what the equation cannot."""
    with pytest.raises(RecipeError):
        validate(LoRA, knobs)
