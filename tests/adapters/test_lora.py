"""LoRA: its equation, its scaling, its dropout, and the files it reads."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from luthier.adapters.ia3 import IA3
from luthier.adapters.lora import FROM_WEIGHT, LookedUp, LoRA, LowRank, Start, combined
from luthier.core.chosen import choose
from luthier.core.errors import RecipeError
from luthier.core.knobs import validate
from luthier.maths import low_rank
from luthier.quantizers import Quantizer
from luthier.recipes.opening.quantized import quantize
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
        {"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"rank_pattern": {"q.*": 2}},
        {"alpha_pattern": {"q|k": 2}}, {"layers_to_transform": [0]}, {"exclude_modules": ["q_proj"]},
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


def test_combined_adapters_are_the_weighted_sum_of_their_updates() -> None:
    """Breaks when factors are added to factors, a scale is lost, or a site that only one of them has is left out."""
    model = forests.language_model("llama")
    ones = [(LoRA(rank=3, alpha=5.0), 0.7), (LoRA(rank=2, rslora=True, targets=("q", "down")), -1.3)]
    parts = [(method.attach(model.sites), weight) for method, weight in ones]
    for seed, (edits, _) in enumerate(parts):
        forests.shake([parameter for edit in edits for parameter in edit.parameters()], seed=seed)
    whole, edits = combined(parts, model.sites)
    assert whole.rank == 5 and whole.scale == 1.0
    expected: dict[str, torch.Tensor] = {}
    for own, weight in parts:
        for edit in own:
            assert isinstance(edit, LowRank)
            update = weight * edit.scale * (edit.up @ edit.down)
            expected[edit.site_name] = expected.get(edit.site_name, torch.zeros(())) + update
    assert len(edits) == len(expected)
    for edit in edits:
        assert isinstance(edit, LowRank)
        torch.testing.assert_close(edit.scale * (edit.up @ edit.down), expected[edit.site_name], rtol=1e-5, atol=1e-6)
    with pytest.raises(RecipeError, match="no low-rank term"):
        combined([(IA3().attach(model.sites), 1.0)], model.sites)
    with pytest.raises(RecipeError, match="no adapter was given"):
        combined([], model.sites)


def test_a_pattern_gives_sites_another_rank_and_alpha() -> None:
    """Breaks when an ending matches in the middle of a name, the scale keeps the general rank, or nothing matches."""
    model = forests.language_model("llama")
    ranks, alphas = {"down_proj": 2, "layers.1.self_attn.q_proj": 6}, {"down_proj": 3.0}
    method = LoRA(rank=4, alpha=8.0, rank_pattern=ranks, alpha_pattern=alphas)
    edits = method.attach(model.sites)
    for edit in edits:
        assert isinstance(edit, LowRank)
        second = {"q_proj": (6, 8 / 6)} if "layers.1" in edit.site_name else {}
        rank, scale = {"down_proj": (2, 1.5), **second}.get(edit.site_name.rpartition(".")[2], (4, 2.0))
        assert (len(edit.down), edit.scale) == (rank, pytest.approx(scale)), edit.site_name
    count = sum(parameter.numel() for edit in edits for parameter in edit.parameters())
    assert method.parameter_count(model.sites) == count
    again = LoRA.from_peft({"peft_type": "LORA", **method.peft_config(model.sites)})
    assert (again.rank_pattern, again.alpha_pattern) == (method.rank_pattern, method.alpha_pattern)
    with pytest.raises(RecipeError, match="no trained site ends in"):
        LoRA(rank_pattern={"proj": 3}).attach(model.sites)
    with pytest.raises(RecipeError, match="rank_pattern"):
        LoRA.from_peft({**method.peft_config(model.sites), "rank_pattern": {"(a+)+$": 3}})


# -------------------------------------------------------------------------------------------------------- the start


@pytest.mark.parametrize("init", FROM_WEIGHT)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_start_from_the_weight_is_taken_off_again(init: Start, architecture: str) -> None:
    """Breaks when the equation is not y = W x + s (B A - B_0 A_0) x, or its gradient is not that of B A alone."""
    model = forests.language_model(architecture)
    method = LoRA(rank=4, alpha=6.0, init=init)
    for site, edit in zip(model.sites.select("all-linear"), method.attach(model.sites), strict=True):
        assert isinstance(edit, LowRank) and edit.first_up is not None and edit.first_down is not None
        down, up = edit.down.detach().clone(), edit.up.detach().clone()
        assert float((up @ down).abs().max()) > 1e-3
        x, y = torch.randn(3, site.in_features), torch.randn(3, site.out_features)
        assert torch.equal(edit.after(x, y), y)
        forests.shake(edit.parameters())
        found = edit.after(x, y)
        expected = y + 1.5 * x @ (edit.up @ edit.down - up @ down).t()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        ours = torch.autograd.grad(found.square().sum(), list(edit.parameters()))
        theirs = torch.autograd.grad(expected.square().sum(), list(edit.parameters()))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_start_from_the_weight_is_the_base_in_bfloat16_too() -> None:
    """Breaks when what cancels is rounded before it does."""
    model = forests.language_model("llama", dtype=torch.bfloat16)
    ids = np.array([5, 17, 90, 3], dtype=np.int32)
    base = forests.logits(model, ids)
    attachment = model.attach(LoRA(rank=4, init="pissa").attach(model.sites))
    assert torch.equal(forests.logits(model, ids), base)
    assert len(attachment.named_constants()) == 2 * len(attachment.edits)


def test_a_start_from_the_weight_is_that_of_a_packed_weight() -> None:
    """Breaks when a quantized base has no start, or gets that of the weight before it was rounded."""
    model = forests.language_model("llama")
    dense = {site.name: site.weight().clone() for site in model.sites.linear()}
    quantize(model, choose("quantizers", Quantizer, "int8"))
    for edit in LoRA(rank=4, alpha=4.0, init="pissa").attach(model.sites):
        assert isinstance(edit, LowRank)
        site = next(site for site in model.sites if site.name == edit.site_name)
        down, up = low_rank.principal(site.weight() + 0, 4, 1.0)
        torch.testing.assert_close(edit.up @ edit.down, up @ down, rtol=1e-4, atol=1e-5)
        assert not torch.equal(site.weight() + 0, dense[site.name])


def test_a_start_from_the_weight_is_saved_as_a_plain_adapter_of_twice_the_rank() -> None:
    """Breaks when a file says that its base was changed, or its scale is another one."""
    sites = forests.language_model("llama").sites
    ranks, alphas = {"down_proj": 2}, {"up_proj": 3.0}
    for rslora in (False, True):
        method = LoRA(rank=4, alpha=8.0, rslora=rslora, init="pissa", rank_pattern=ranks, alpha_pattern=alphas)
        config = method.peft_config(sites)
        assert (config["r"], config["init_lora_weights"], config["rank_pattern"]) == (8, True, {"down_proj": 4})
        again = LoRA.from_peft(config)
        assert again.init == "kaiming"
        for site in sites.linear():
            assert again.rank_of(site) == 2 * method.rank_of(site)
            assert again.scale_of(site) == pytest.approx(method.scale_of(site), rel=1e-12)


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4", "loftq", "corda", "lora_ga", ["pissa"]])
def test_a_file_for_a_base_that_was_changed_is_refused(init: Any) -> None:
    """Breaks when an adapter is put on a weight that its training never saw."""
    with pytest.raises(RecipeError, match="weights were changed"):
        LoRA.from_peft({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "init_lora_weights": init})
    for plain in ("eva", "mica", False):
        known = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "init_lora_weights": plain}
        assert LoRA.from_peft(known).init == "kaiming"


def test_starts_that_a_site_cannot_have_are_refused() -> None:
    """Breaks when a rank of more directions than there are is cut in silence, or an odd one halved."""
    model = forests.language_model("llama")
    with pytest.raises(RecipeError, match=r"takes 17 directions of .*k_proj, which has 16"):
        LoRA(rank=17, init="pissa").attach(model.sites)
    with pytest.raises(RecipeError, match="halves the rank, which is 3"):
        LoRA(rank=3, init="orthogonal").attach(model.sites)


# ---------------------------------------------------------------------------------------------------- the embedding


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_equation_at_the_embedding(architecture: str) -> None:
    """Breaks when a token sees another one's column, the scale is lost, or dropout draws there."""
    model = forests.language_model(architecture)
    [embed] = model.sites.role("embed")
    [edit] = LoRA(rank=4, alpha=6.0, dropout=0.5, targets=("embed",), init="gaussian").attach(model.sites)
    assert isinstance(edit, LookedUp) and not edit.down.any()
    assert float(edit.up.detach().std()) == pytest.approx(1, rel=0.2)
    forests.shake(edit.parameters())
    edit.train()
    ids = torch.tensor([[5, 17, 5], [90, 3, 127]])
    base = embed.module(ids)
    # Rows are scaled where the base's are: the table is what is changed.
    table = embed.weight() + 1.5 * (edit.up @ edit.down).t()
    ratio = (base / embed.weight()[ids]).median()
    torch.testing.assert_close(edit.after(ids, base), ratio * table[ids], rtol=1e-4, atol=1e-4)
    assert edit.rate_factors() == {}


def test_an_embedding_is_a_target_by_its_role_or_name_and_of_lora_alone() -> None:
    """Breaks when all-linear takes the embedding, a pattern misses it, or its rank pattern does."""
    model = forests.language_model("llama")
    for targets in (("embed",), ("embed_tokens",), "embed_tokens", r"model\.embed_\w+"):
        method = LoRA(targets=targets, rank_pattern={"embed_tokens": 3})
        [edit] = method.attach(model.sites)
        assert isinstance(edit, LookedUp) and edit.down.shape == (3, 128)
        assert method.parameter_count(model.sites) == 3 * (128 + 32)
        assert method.peft_config(model.sites)["target_modules"] == ["embed_tokens"]
    assert all(isinstance(edit, LowRank) for edit in LoRA().attach(model.sites))
    with pytest.raises(RecipeError, match="no site matches the target 'embed'"):
        model.sites.select(("embed",))


def test_an_embedding_has_no_start_from_a_weight_and_one_change_at_once() -> None:
    """Breaks when two edits of one table are taken, or a start is quietly another one."""
    model = forests.language_model("llama")
    with pytest.raises(RecipeError, match=r"adapter\.init pissa starts from a layer's weight"):
        LoRA(rank=4, targets=("embed", "q"), init="pissa").attach(model.sites)
    with pytest.raises(RecipeError, match="in two ways at once"):
        model.attach(LoRA(targets=("embed",), trainable_tokens=(5,)).attach(model.sites))
