"""Full fine-tuning: which parameters, tied ones, and the base that comes back."""

from __future__ import annotations

import pytest

from luthier.adapters.full import Full
from luthier.core.errors import RecipeError
from luthier.data.forest import Forest
from tests import forests
from tests.forests import ARCHITECTURES


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_parameters_are_trained_each_once(architecture: str) -> None:
    """Breaks when a norm, a bias or the table of positions is left frozen, or a tied matrix counted twice."""
    model = forests.language_model(architecture)
    total = sum(parameter.numel() for parameter in model.module.parameters())
    assert Full().parameter_count(model.sites) == total
    attachment = model.attach(Full().attach(model.sites))
    assert attachment.trains_base and attachment.parameter_count == total
    assert all(parameter.requires_grad for parameter in model.module.parameters())


def test_some_layers_alone() -> None:
    """Breaks when the embeddings come along, or layer 1 stands for another."""
    model = forests.language_model("llama")
    attachment = model.attach(Full(layers=(1,)).attach(model.sites))
    trained = {name for name, parameter in model.module.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.module.named_parameters() if name.startswith("model.layers.1.")}
    assert attachment.parameter_count == Full(layers=(1,)).parameter_count(model.sites)
    with pytest.raises(RecipeError, match="do not exist"):
        Full(layers=(0, 2)).attach(forests.language_model("llama").sites)


def test_gradients_equal_those_of_the_zoo() -> None:
    """Breaks when the trained copy is not what the model computes with."""
    model = forests.language_model("qwen2")
    attachment = model.attach(Full().attach(model.sites))
    trees = forests.rows(3, ones=True)
    forests.engine_loss(model, trees).backward()
    plain = forests.zoo("qwen2", ours=False)
    loss = forests.brute_loss(plain, Forest(tuple(trees)))
    expected = forests.gradients(loss, dict(plain.named_parameters()))
    trained = {id(parameter): parameter for parameter in attachment.named_parameters().values()}
    found = {name: trained[id(p)].grad for name, p in model.module.named_parameters()}
    assert all(gradient is not None for gradient in found.values())
    forests.assert_same_gradients({n: g for n, g in found.items() if g is not None}, expected)


def test_peft_has_no_file_for_it() -> None:
    """Breaks when a whole model is written as an adapter."""
    with pytest.raises(RecipeError, match="save the model"):
        Full().peft_config(forests.language_model("llama").sites)
    with pytest.raises(RecipeError, match="as a model"):
        Full.from_peft({})
