"""Prefix tuning: the learned root is exactly a cache of keys and values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from luthier.adapters.prefix_tuning import Prefix, PrefixTuning
from luthier.core.errors import RecipeError
from luthier.data.forest import Forest, Segment, Tree, row_tree
from luthier.model.editing.edits import LearnedKeysValues
from luthier.model.language_model import LanguageModel
from tests import forests
from tests.forests import ARCHITECTURES

PREFIX = np.array([9, 77, 31, 4, 50], dtype=np.int32)


def with_true_cache(architecture: str) -> LanguageModel:
    """A model whose learned prefix holds the keys and values that the tokens of PREFIX leave behind."""
    model = forests.language_model(architecture)
    cache = DynamicCache()
    forests.logits(model, PREFIX, seen=cache)
    attachment = model.attach(PrefixTuning(prefix_tokens=len(PREFIX)).attach(model.sites))
    root = attachment.root
    assert isinstance(root, Prefix)
    with torch.no_grad():
        target = root.prefix.view(root.shape)
        for layer in range(model.sites.layers):
            target[:, layer, 0] = cache.layers[layer].keys[0].transpose(0, 1)
            target[:, layer, 1] = cache.layers[layer].values[0].transpose(0, 1)
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_true_cache_as_prefix_gives_the_concatenated_sequence(architecture: str) -> None:
    """Breaks when keys and values are exchanged, positions do not go on after the root, or a window forgets it."""
    model = with_true_cache(architecture)
    tree = forests.branching(seed=4)
    outputs = model.token_outputs(Forest((tree, *forests.rows(2, seed=1))))
    model.detach()
    silent = np.zeros(len(PREFIX), dtype=np.float32)
    rooted = [
        Tree(
            (
                Segment(PREFIX, silent),
                *(Segment(s.tokens, np.append(0 * s.weights[:1], s.weights[1:]) if s.parent < 0 else s.weights,
                          s.parent + 1) for s in each.segments),
            )
        )
        for each in (tree, *forests.rows(2, seed=1))
    ]  # fmt: skip
    expected = forests.brute_log_probs(forests.zoo(architecture, ours=False), Forest(tuple(rooted)))
    torch.testing.assert_close(outputs.log_probs.detach(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_gradient_of_the_prefix_is_that_of_the_cache(architecture: str) -> None:
    """Breaks when the prefix is cut off from the graph in some layer."""
    model = forests.language_model(architecture)
    attachment = model.attach(PrefixTuning(prefix_tokens=3).attach(model.sites))
    ids = np.array([5, 6, 7, 8], dtype=np.int32)
    tree = row_tree(ids, np.ones(4, dtype=np.float32))
    forests.engine_loss(model, [tree]).backward()
    (parameter,) = attachment.named_parameters().values()
    found = parameter.grad
    cache = DynamicCache()
    assert isinstance(attachment.root, LearnedKeysValues) and found is not None
    for layer, both in enumerate(attachment.root.keys_values(torch.float32)):
        cache.update(both[0][None], both[1][None], layer)
    row = torch.from_numpy(ids.astype(np.int64))[None]
    logits = model.module(input_ids=row, position_ids=torch.arange(3, 7)[None], past_key_values=cache).logits[0]
    loss = torch.nn.functional.cross_entropy(logits[:-1], row[0, 1:], reduction="sum")
    (expected,) = torch.autograd.grad(loss, parameter)
    assert forests.relative_error(found, expected) <= 1e-5
    assert all(float(part.abs().max()) > 0 for part in found.view(3, model.sites.layers, 2, -1).unbind(1))


def test_the_prefix_takes_the_models_key_value_heads() -> None:
    """Breaks when grouped queries get a prefix as wide as all heads."""
    model = forests.language_model("llama")
    method = PrefixTuning(prefix_tokens=3)
    (edit,) = method.attach(model.sites)
    assert edit.tensors()["prompt_embeddings"].shape == (3, 2 * 2 * 2 * 8)
    config = method.peft_config(model.sites)
    assert (config["num_attention_heads"], config["token_dim"], config["num_layers"]) == (2, 16, 2)
    assert PrefixTuning.from_peft(config) == method
    with pytest.raises(RecipeError, match="encoder-decoder"):
        PrefixTuning.from_peft({**config, "num_transformer_submodules": 2})


def test_two_roots_at_once_are_refused_and_one_of_them_works() -> None:
    """Breaks when one of two prefixes is silently ignored."""
    model = forests.language_model("llama")
    for name in ("one", "two"):
        model.attach(PrefixTuning(prefix_tokens=2).attach(model.sites), name=name)
    with pytest.raises(RecipeError, match="one at a time"):
        model.token_outputs(Forest(tuple(forests.rows(1))))
    model.switch("one", on=False)
    assert model.active_root is model.attachments["two"].root


def test_the_start_has_the_asked_spread() -> None:
    """Breaks when the knob is not read."""
    model = forests.language_model("llama")
    torch.manual_seed(0)
    (edit,) = PrefixTuning(prefix_tokens=200, init_std=0.5).attach(model.sites)
    assert float(edit.tensors()["prompt_embeddings"].detach().std()) == pytest.approx(0.5, rel=0.05)
