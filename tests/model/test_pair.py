"""Changes as matrices: those of every kind of adapter add up to what a merge would make of it."""

from __future__ import annotations

import pytest
import torch

from luthier.adapters import Adapter
from luthier.core.chosen import choose
from luthier.model.comparing.pair import changes_of, pair_of_adapter, pair_of_models
from luthier.model.editing.edits import inner_module
from luthier.quantizers.nf4 import NF4
from luthier.recipes.opening.quantized import quantize
from tests import forests
from tests.pairs import IDS


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "sparse", "full"])
def test_base_and_change_add_up_to_the_merged_weight(name: str, kind: str) -> None:
    """Breaks when a scale, a transpose or an edit is lost on the way to a matrix."""
    model = forests.language_model(kind)
    attachment = model.attach(choose("adapters", Adapter, name).attach(model.sites))
    forests.shake(attachment.named_parameters().values(), seed=3)
    changes, beside = changes_of(model)
    tuned = {change.name: change.after().whole().clone() for change in changes}
    bases = {change.name: change.base().clone() for change in changes}
    norms = {change.name: change.norm() for change in changes}
    transposed = {site.name: site.transposed for site in model.sites}
    assert changes and (name != "full" or "TrainedParameters" in beside)
    with model.without_attachments():
        for name_, base in bases.items():
            weight = inner_module(model.module, name_).get_parameter("weight")
            assert torch.equal(base, weight.t() if transposed[name_] else weight)
    model.merge()
    for name_, whole in tuned.items():
        weight = inner_module(model.module, name_).get_parameter("weight")
        assert torch.allclose(whole, weight.t() if transposed[name_] else weight, atol=1e-5)
        assert norms[name_] == pytest.approx(float((whole - bases[name_]).norm()), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", ["prefix_tuning", "prompt_tuning", "bottleneck"])
def test_what_changes_no_matrix_is_said(name: str) -> None:
    """Breaks when an inserted layer or a learned prefix goes without a word."""
    model = forests.language_model("llama")
    model.attach(choose("adapters", Adapter, name).attach(model.sites))
    changes, beside = changes_of(model)
    assert not changes and beside


def test_two_models_are_compared_by_name_and_a_resized_table_is_said() -> None:
    """Breaks when matrices of another shape are compared, or left out without a word."""
    before, after = forests.language_model("llama"), forests.language_model("llama", seed=1)
    assert {change.name for change in pair_of_models(before, after).changes} == {
        site.name for site in before.sites if site.is_linear or "embed" in site.roles
    }
    after.module.resize_token_embeddings(200, mean_resizing=False)
    other = forests.LanguageModel(after.module, source="x", digest="x")
    assert set(pair_of_models(before, other).beside) == {"model.embed_tokens", "lm_head"}


def test_the_base_is_asked_without_the_adapter_and_packed_weights_are_unpacked() -> None:
    """Breaks when before and after are one, or a packed base is read as its codes."""
    model = forests.language_model("llama")
    plain = {site.name: site.weight().clone() for site in model.sites if site.is_linear}
    quantize(model, NF4(block=32))
    attachment = model.attach(choose("adapters", Adapter, "lora").attach(model.sites))
    forests.shake(attachment.named_parameters().values(), seed=3)
    pair = pair_of_adapter(model)
    for change in pair.changes:
        assert float((change.base() - plain[change.name]).norm() / plain[change.name].norm()) < 0.2
    with pair.before() as one:
        base = forests.logits(one, IDS[0])
    with pair.after() as one:
        assert not torch.allclose(base, forests.logits(one, IDS[0]))
