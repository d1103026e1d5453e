"""Which executor runs a model, and that the fallbacks compute the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from luthier.adapters.lora import LoRA
from luthier.adapters.prefix_tuning import PrefixTuning
from luthier.core.errors import RecipeError
from luthier.data.forest import Forest, row_tree
from luthier.model.editing.edits import LearnedRoot
from luthier.model.language_model import LanguageModel
from tests import forests
from tests.forests import ARCHITECTURES
from tests.tiny import tiny_model

FOREST = Forest((forests.branching(seed=1), *forests.rows(2, seed=2), forests.branching(seed=3, row=2)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_models_with_driven_attention_run_by_segment(architecture: str) -> None:
    """Breaks when the probe finds a difference, or falls back for a model we drive."""
    model = forests.language_model(architecture)
    assert (model.executor.kind, model.executor.own_head, model.executor.reason) == ("segments", True, "")
    assert model.notices == []


def test_a_recurrent_model_falls_back_to_unrolled_paths_with_the_same_loss() -> None:
    """Breaks when padding enters a state, or a shared prefix counts once for each path."""
    module = forests.mamba()
    model = LanguageModel(module, source="tiny/mamba", digest="")
    assert model.executor.kind == "unrolled" and model.executor.own_head
    assert any("forest executor: unrolled" in notice for notice in model.notices)
    parameters = forests.trainable(model)
    found = forests.engine_loss(model, FOREST.trees)
    expected = forests.brute_loss(module, FOREST)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    forests.assert_same_gradients(forests.gradients(found, parameters), forests.gradients(expected, parameters))


def test_a_recurrent_model_takes_lora_and_refuses_a_learned_root() -> None:
    """Breaks when keys and values are learned that no layer reads."""
    model = LanguageModel(forests.mamba(), source="tiny/mamba", digest="")
    attachment = model.attach(LoRA(rank=2).attach(model.sites))
    forests.shake(attachment.named_parameters().values())
    loss = forests.engine_loss(model, FOREST.trees)
    assert loss.item() == pytest.approx(forests.brute_loss(model.module, FOREST).item(), rel=1e-5)
    with pytest.raises(RecipeError, match="no attention"):
        PrefixTuning(prefix_tokens=2).attach(model.sites)


def test_attention_that_is_not_ours_falls_back_and_says_so() -> None:
    """Breaks when a model with another attention implementation is taken for one we drive."""
    model = LanguageModel(tiny_model("llama"), source="tiny/llama", digest="")
    assert model.executor.kind == "unrolled"
    assert "does not support the attention interface" in model.executor.reason
    expected = forests.brute_loss(model.module, FOREST)
    assert forests.engine_loss(model, FOREST.trees).item() == pytest.approx(expected.item(), rel=1e-5)
    root = PrefixTuning(prefix_tokens=2).attach(model.sites)
    assert isinstance(root[0], LearnedRoot)
    model.attach(root)
    with pytest.raises(RecipeError, match="learned roots need it"):
        model.token_outputs(FOREST)


def test_a_head_that_our_numbers_do_not_describe_is_left_to_the_zoo() -> None:
    """Breaks when the probe does not compare our head with the model's own logits."""
    module = forests.zoo("llama")
    module.config.final_logit_softcapping = 0.5
    model = LanguageModel(module, source="tiny/llama", digest="")
    assert (model.executor.own_head, model.head) == (False, None)
    assert "computed by the zoo" in model.executor.reason
    expected = forests.brute_loss(module, FOREST)
    assert forests.engine_loss(model, FOREST.trees).item() == pytest.approx(expected.item(), rel=1e-5)


def test_hidden_states_that_do_not_give_the_models_logits_are_refused() -> None:
    """Breaks when a model is trained on numbers that are not its own."""
    module = forests.zoo("llama")
    original = type(module).forward

    def other(self: torch.nn.Module, *args: object, **settings: object) -> object:
        result = original(self, *args, **settings)
        result.logits = result.logits.flip(-1)
        return result

    module.forward = other.__get__(module)
    with pytest.raises(RecipeError, match="do not reproduce"):
        LanguageModel(module, source="tiny/llama", digest="")


def test_a_forest_without_weights_has_no_outputs_and_no_error() -> None:
    """Breaks when a micro-batch of context only ends in an empty reduction."""
    model = forests.language_model("llama")
    rng = np.random.default_rng(0)
    tree = row_tree(forests.tokens(rng, 4), np.zeros(4, dtype=np.float32))
    assert model.token_outputs(Forest((tree,))).log_probs.shape == (0,)
