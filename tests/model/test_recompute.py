"""Recomputed blocks: the same bits for every adapter of the catalog, and nothing kept but what goes into a block."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from luthier.adapters import Adapter
from luthier.core import catalog
from luthier.core.errors import RecipeError
from luthier.data.forest import Tree
from luthier.model.language_model import LanguageModel
from luthier.objectives.sft import SFT
from luthier.optimizers.adamw import AdamW
from luthier.train.pass_report import PassReport
from luthier.train.stepper import Stepper
from tests import forests
from tests.contracts.resumption import with_dropout

SHAPED = ("llama", "qwen2", "mistral")
NAMES = catalog.names("adapters")
TREES = [*forests.rows(5, longest=20), forests.branching(row=9)]


def stepper(architecture: str, adapter: str, recomputed: int, *, dtype: torch.dtype, micro_tokens: int) -> Stepper:
    """Adapters with their dropout on; attention of the base drops nothing, as in every model of today."""
    model = forests.language_model(architecture, dtype=dtype)
    torch.manual_seed(0)
    attachment = model.attach(with_dropout("adapters", Adapter, adapter).attach(model.sites))
    forests.shake(attachment.named_parameters().values())
    model.recompute(recomputed)
    torch.manual_seed(1)
    return Stepper(model, attachment, SFT(), AdamW(), micro_tokens=micro_tokens)


def passed(made: Stepper, trees: list[Tree]) -> tuple[PassReport, dict[str, Tensor], Tensor]:
    """What a pass has found, its gradients, and where it has left the random numbers."""
    report = made.forward_backward(trees)
    gradients = {name: master.grad for name, master in made.masters.items() if master.grad is not None}
    return report, gradients, torch.get_rng_state()


@pytest.mark.parametrize(
    ("architecture", "adapter", "dtype", "micro_tokens"),
    [
        # Every adapter on every model in each test run; in one dtype and cut, in turn.
        pytest.param(architecture, adapter, dtype, tokens,
                     id=f"{architecture}-{adapter}-{dtype}-{cut}",
                     marks=() if (one + two) % 4 == three else pytest.mark.slow)
        for one, architecture in enumerate(SHAPED)
        for two, adapter in enumerate(NAMES)
        for three, (dtype, (tokens, cut)) in enumerate(
            product((torch.float32, torch.bfloat16), ((4096, "at once"), (12, "in parts")))
        )
    ],
)  # fmt: skip
def test_no_bit_depends_on_what_is_recomputed(
    architecture: str, adapter: str, dtype: torch.dtype, micro_tokens: int
) -> None:
    """Breaks when a dropout mask is drawn anew, keys of a shared root are made twice, or a block is left out."""
    made = [
        passed(stepper(architecture, adapter, count, dtype=dtype, micro_tokens=micro_tokens), TREES)
        for count in range(forests.LAYERS + 1)
    ]
    kept, gradients, left = made[0]
    assert gradients
    for report, found, random in made[1:]:
        assert report == kept and torch.equal(random, left)
        assert found.keys() == gradients.keys()
        assert all(torch.equal(found[name], gradients[name]) for name in gradients)


def test_dropout_of_the_base_falls_as_before() -> None:
    """Breaks when a block of the zoo, with dropout in its attention, is recomputed with other random numbers."""
    found = []
    for count in (0, forests.LAYERS):
        made = stepper("llama", "lora", count, dtype=torch.float32, micro_tokens=4096)
        for layer in made.model.module.base_model.get_submodule("layers").children():
            vars(layer.get_submodule("self_attn"))["attention_dropout"] = 0.3
        found.append(passed(made, TREES))
    (kept, gradients, _), (report, others, _) = found
    assert report == kept and all(torch.equal(others[name], gradients[name]) for name in gradients)


def test_what_looks_on_is_not_passed_over() -> None:
    """Breaks when a hook does not see the outputs of a recomputed block, or none is made without gradients."""
    model = forests.language_model("llama")
    attachment = model.attach(with_dropout("adapters", Adapter, "ia3").attach(model.sites))
    forests.shake(attachment.named_parameters().values())
    model.recompute(model.recomputable)
    seen: list[str] = []
    layers = list(model.module.base_model.get_submodule("layers").children())
    for index, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, index=index: seen.append(str(index)))
    loss = forests.engine_loss(model, forests.rows(2))
    once = len(seen)
    assert once == len(layers)
    loss.backward()
    assert len(seen) > once
    with torch.no_grad():
        seen.clear()
        forests.engine_loss(model, forests.rows(2))
    assert len(seen) == once


def test_only_blocks_that_we_run_can_be_recomputed() -> None:
    """Breaks when a number that means nothing is taken without a word."""
    model = forests.language_model("llama")
    assert model.recomputable == forests.LAYERS
    for wrong in (-1, forests.LAYERS + 1):
        with pytest.raises(RecipeError, match=f"{wrong} blocks cannot be recomputed"):
            model.recompute(wrong)
    left = LanguageModel(forests.zoo("gemma2"), source="tiny/gemma2", digest="")
    assert left.recomputable == 0
    left.recompute(0)
    with pytest.raises(RecipeError, match="cannot be recomputed") as caught:
        left.recompute(1)
    assert "0 to 0" in caught.value.allowed


def test_a_model_without_our_blocks_is_told_by_its_executor() -> None:
    """Breaks when a model whose blocks have stepped aside is planned as if they could be recomputed."""
    model = forests.language_model("llama")
    model.executor = replace(model.executor, blocks=None)
    assert model.recomputable == 0
