"""Blocks run by our own operations equal the zoo's modules, whatever is attached to them, and step aside where told."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GraniteConfig, PreTrainedModel, Qwen3Config

from luthier.adapters.full import Full
from luthier.adapters.ia3 import IA3
from luthier.adapters.lora import LoRA
from luthier.adapters.prefix_tuning import PrefixTuning
from luthier.core.errors import RecipeError
from luthier.data.forest import Forest, Segment, Tree, row_tree
from luthier.kernels.torch_backend import TorchBackend
from luthier.kernels.wanted import wanted_kernels
from luthier.model.attending import attention
from luthier.model.attending.kept import AttentionCall
from luthier.model.editing.edits import Edit
from luthier.model.editing.sites import Sites
from luthier.model.language_model import LanguageModel
from luthier.model.load import load_model
from luthier.model.running import blocks
from luthier.model.running.blocks import Blocks
from luthier.objectives.sft import SFT
from luthier.optimizers.adamw import AdamW
from luthier.train.stepper import Stepper
from tests import forests
from tests.tiny import HIDDEN, VOCABULARY, WINDOW

SHAPED = ("llama", "qwen2", "mistral")
ATTACHED: dict[str, Callable[[Sites], list[Edit]]] = {
    "lora": LoRA(rank=3).attach,
    "lora on some": LoRA(rank=3, targets=("q", "v", "down")).attach,
    "lora and token rows": LoRA(rank=3, trainable_tokens=(5, 9)).attach,
    "full": Full().attach,
    "ia3": IA3().attach,
    "prefix": PrefixTuning(prefix_tokens=2).attach,
}


def two(architecture: str, attach: Callable[[Sites], list[Edit]]) -> list[LanguageModel]:
    """The same model, fused and not, with the same edits."""
    made = []
    for fused in (True, False):
        model = forests.language_model(architecture, fused=fused)
        torch.manual_seed(0)
        forests.shake(model.attach(attach(model.sites)).named_parameters().values())
        assert (model.executor.blocks is not None) == fused
        made.append(model)
    return made


def trained(model: LanguageModel) -> dict[str, nn.Parameter]:
    return model.attachments["default"].named_parameters()


def mixed() -> list[Tree]:
    """Texts with nothing in common, some longer than a window, and a prompt with several answers."""
    return [*forests.rows(5, longest=3 * WINDOW), forests.branching(row=9)]


@pytest.mark.parametrize("trees", [forests.rows(6, longest=3 * WINDOW), mixed()], ids=["texts", "branches"])
@pytest.mark.parametrize("name", ATTACHED)
@pytest.mark.parametrize("architecture", SHAPED)
def test_losses_and_gradients_are_those_of_the_zoos_modules(architecture: str, name: str, trees: list[Tree]) -> None:
    """Breaks when a window, a bias, a norm or an edit is passed over, or a tied head loses its gradient."""
    ours, theirs = two(architecture, ATTACHED[name])
    found, expected = forests.engine_loss(ours, trees), forests.engine_loss(theirs, trees)
    assert found.item() == pytest.approx(expected.item(), rel=2e-6)
    forests.assert_same_gradients(
        forests.gradients(found, trained(ours)), forests.gradients(expected, trained(theirs)), tolerance=1e-4
    )


def test_norms_of_heads_are_applied() -> None:
    """Breaks when qwen3's queries and keys go past their norms."""
    attention.register()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=256, initializer_range=0.2,
        )  # fmt: skip
        module: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    forests.shake([parameter for parameter in module.parameters() if parameter.ndim == 1])
    module.set_attn_implementation(attention.NAME)
    model = LanguageModel(module, source="tiny/qwen3", digest="")
    assert model.executor.blocks is not None
    forest = Forest(tuple(mixed()))
    expected = forests.brute_log_probs(module, forest)
    torch.testing.assert_close(model.token_outputs(forest).log_probs, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "gemma"])
def test_another_shape_is_left_to_the_zoo(architecture: str) -> None:
    """Breaks when a model is taken for one that it resembles."""
    model = forests.language_model(architecture)
    assert model.executor.kind == "segments" and model.executor.blocks is None


def test_a_shape_that_computes_something_else_is_left_to_the_zoo() -> None:
    """Breaks when the shape alone decides: granite's blocks look like llama's and scale their residuals."""
    attention.register()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GraniteConfig(
            vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2, residual_multiplier=0.6,
        )  # fmt: skip
        module: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    module.set_attn_implementation(attention.NAME)
    calls = {index: AttentionCall(None, None, None) for index in range(2)}
    assert Blocks.of(module, calls, TorchBackend()) is not None
    model = LanguageModel(module, source="tiny/granite", digest="")
    assert model.executor.kind == "segments" and model.executor.blocks is None


def test_what_watches_a_module_is_called() -> None:
    """Breaks when a hook, which diagnosis and users put on modules, sees nothing."""
    ours, theirs = two("llama", ATTACHED["lora"])
    seen: list[int] = []
    place = ours.module.get_submodule("model.layers.0.mlp.down_proj")
    handle = place.register_forward_hook(lambda *_: seen.append(1))
    trees = forests.rows(3)
    found = forests.engine_loss(ours, trees)
    assert seen and found.item() == pytest.approx(forests.engine_loss(theirs, trees).item(), rel=2e-6)
    handle.remove()
    forests.engine_loss(ours, trees)
    assert len(seen) == 1


def test_a_second_adapter_at_the_same_places_is_not_forgotten() -> None:
    """Breaks when only the first edit of a layer counts, or one that is switched off does."""
    ours, theirs = two("llama", ATTACHED["lora"])
    trees = forests.rows(3)
    for model in (ours, theirs):
        torch.manual_seed(1)
        forests.shake(model.attach(LoRA(rank=2).attach(model.sites), name="second").named_parameters().values(), seed=3)
    both = [forests.engine_loss(model, trees).item() for model in (ours, theirs)]
    for model in (ours, theirs):
        model.switch("default", on=False)
    second = [forests.engine_loss(model, trees).item() for model in (ours, theirs)]
    assert both[0] == pytest.approx(both[1], rel=2e-6) and second[0] == pytest.approx(second[1], rel=2e-6)
    assert abs(both[0] - second[0]) > 1e-3


def test_dropout_is_drawn_as_ever() -> None:
    """Breaks when dropout of an adapter, or of the base's attention, is passed over in training."""
    for attach, base in ((LoRA(rank=3, dropout=0.5).attach, 0.0), (ATTACHED["lora"], 0.5)):
        losses = []
        for model in two("llama", attach):
            for layer in model.module.base_model.layers:  # type: ignore[union-attr]
                layer.self_attn.attention_dropout = base
            model.train()
            torch.manual_seed(0)
            losses.append(forests.engine_loss(model, forests.rows(4)).item())
            model.train(False)
            assert forests.engine_loss(model, forests.rows(4)).item() != pytest.approx(losses[-1], rel=1e-4)
        assert losses[0] == pytest.approx(losses[1], rel=2e-6)


def test_the_last_feed_forward_sees_only_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when tokens that nobody predicts from go all the way up."""
    model = forests.language_model("llama")
    rows: list[int] = []
    real = blocks.gated_feed_forward

    def spy(x: torch.Tensor, *rest: object) -> torch.Tensor:
        rows.append(len(x))
        return real(x, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(blocks, "gated_feed_forward", spy)
    weights = np.zeros(12, np.float32)
    weights[8:] = 1
    tree = row_tree(forests.tokens(np.random.default_rng(0), 12), weights)
    model.token_outputs(Forest((tree,)))
    assert rows == [12, 4]


def test_a_tree_in_parts_has_the_same_gradient() -> None:
    """Breaks when the trunk's keys and values are not captured on the way."""
    rng = np.random.default_rng(0)
    branches = [Segment(forests.tokens(rng, 4), np.ones(4, np.float32), 0) for _ in range(4)]
    tree = Tree((Segment(forests.tokens(rng, 6), np.ones(6, np.float32)), *branches))
    found = []
    for model in two("llama", ATTACHED["lora"]):
        for parameter in trained(model).values():
            parameter.grad = None
        for _ in model.backward_in_parts(tree, SFT().loss, max_tokens=4):
            pass
        found.append({name: parameter.grad for name, parameter in trained(model).items() if parameter.grad is not None})
    assert found[0]
    forests.assert_same_gradients(found[0], found[1], tolerance=1e-4)


@pytest.mark.parametrize("name", ["lora", "full"])
def test_thirty_steps_give_the_same_losses(name: str) -> None:
    """Breaks when a difference that one step hides grows."""
    losses = []
    for model in two("llama", ATTACHED[name]):
        stepper = Stepper(model, model.attachments["default"], SFT(), AdamW(learning_rate=3e-3), micro_tokens=40)
        steps = []
        for step in range(30):
            steps.append(stepper.forward_backward(forests.rows(6, seed=step % 5)).loss)
            stepper.optim_step()
        losses.append(steps)
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0][-1] < 0.8 * losses[0][0]


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when LUTHIER_KERNELS is not heeded, or a word that nobody knows is taken for one."""
    assert wanted_kernels({}) == wanted_kernels({"LUTHIER_KERNELS": ""}) == "auto"
    with pytest.raises(RecipeError, match="auto, torch, blocks"):
        wanted_kernels({"LUTHIER_KERNELS": "fast"})
    assert load_model("seedling").executor.blocks is not None
    for choice, ours in (("torch", False), ("blocks", True)):
        monkeypatch.setenv("LUTHIER_KERNELS", choice)
        executor = load_model("seedling").executor
        assert (executor.blocks is not None) == ours and isinstance(executor.backend, TorchBackend)
