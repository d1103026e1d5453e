"""The promises of an adapter on encoders, classifiers and encoder-decoders, for every method of the catalog."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from luthier.adapters import Adapter, saved_adapter
from luthier.core import catalog
from luthier.core.chosen import choose
from luthier.core.errors import RecipeError
from luthier.data.forest import Forest, Tree
from luthier.model.editing.attachment import Attachment
from luthier.model.editing.edits import EditedModule
from luthier.model.files.adapter_config import read_config
from luthier.model.files.adapter_files import fill
from luthier.model.language_model import LanguageModel
from luthier.model.load import load_model
from luthier.model.packed import PackedWeight
from luthier.model.tasks import PEFT_TYPES, Task
from luthier.quantizers import Quantizer
from luthier.recipes.opening.quantized import quantize
from luthier.train.result import save_result
from tests import forests, task_models
from tests.contracts.crossed import case
from tests.task_models import ANSWERS, MASKED, TEXTS, WORDS

NAMES = catalog.names("adapters")
TOKENS = "trainable_tokens"
MODELS = [("bert", TEXTS), ("bert", MASKED), ("distilbert", WORDS), ("t5", ANSWERS)]
IDS = [f"{name}-{task.name}" for name, task in MODELS]
each = pytest.mark.parametrize(
    ("name", "architecture", "task"),
    [
        # Each method on the classifier in each test run, and on one of the others in turn.
        case(name, *model, quick=place in (0, 1 + turn % (len(MODELS) - 1)))
        for (turn, name), (place, model) in product(enumerate(NAMES), enumerate(MODELS))
    ],
    ids=[f"{name}-{model}" for name, model in product(NAMES, IDS)],
)


def method(name: str) -> Adapter:
    """The adapter with its defaults; what trains rows of tokens is told which, as an encoder says no end of a text."""
    return choose("adapters", Adapter, {"method": name, "tokens": (*range(3, 60),)} if name == TOKENS else name)


def rows(architecture: str, task: Task, seed: int = 0) -> list[Tree]:
    return task_models.trees(task, both_ways=True, types=architecture == "bert", seed=seed)


def log_probs(model: LanguageModel, trees: list[Tree]) -> Tensor:
    with torch.no_grad():
        return model.token_outputs(Forest(tuple(trees))).log_probs


def attached(name: str, architecture: str, task: Task, *, moved: bool = True) -> tuple[LanguageModel, Attachment]:
    """A model with the adapter on it, moved away from its start."""
    model = task_models.language_model(architecture, task)
    torch.manual_seed(7)
    attachment = model.attach(method(name).attach(model.sites))
    if moved:
        forests.shake(attachment.named_parameters().values())
    return model, attachment


@each
def test_identity_switching_off_and_undo(name: str, architecture: str, task: Task) -> None:
    """Breaks when an edit starts anywhere but at the base, stays when it is off, or is left behind."""
    model = task_models.language_model(architecture, task)
    trees = rows(architecture, task)
    base, before = log_probs(model, trees), forests.snapshot(model.module)
    torch.manual_seed(7)
    attachment = model.attach(method(name).attach(model.sites))
    assert torch.equal(log_probs(model, trees), base) != ("learned-root" in method(name).provides)
    forests.shake(attachment.named_parameters().values())
    adapted = log_probs(model, trees)
    assert not torch.equal(adapted, base)
    with model.without_attachments():
        assert torch.equal(log_probs(model, trees), base)
    assert torch.equal(log_probs(model, trees), adapted)
    model.detach()
    assert torch.equal(log_probs(model, trees), base)
    assert forests.snapshot(model.module) == before


@each
def test_gradients_reach_exactly_the_declared_parameters_and_the_new_head(
    name: str, architecture: str, task: Task
) -> None:
    """Breaks when a frozen parameter collects a gradient, or a declared one (a new head's too) has none."""
    model, attachment = attached(name, architecture, task)
    declared = attachment.named_parameters()
    forests.engine_loss(model, [*rows(architecture, task), *rows(architecture, task, seed=5)]).backward()
    unused = {key for key, each in declared.items() if each.grad is None or not float(each.grad.abs().max())}
    # BERT pools for classes only.
    assert not {key for key in unused if "pooler" not in key}, unused
    trained = {id(parameter) for parameter in declared.values()}
    assert [key for key, p in model.module.named_parameters() if p.requires_grad and id(p) not in trained] == []
    assert bool(attachment.new_parts) == task.classifies or attachment.trains_base


@each
def test_the_declared_count_is_made_beside_the_new_head(name: str, architecture: str, task: Task) -> None:
    """Breaks when the closed form forgets a matrix of an architecture."""
    model, attachment = attached(name, architecture, task)
    head = 0
    for part in attachment.new_parts:
        head += sum(each.numel() for each in model.module.get_submodule(part).parameters())
    assert method(name).parameter_count(model.sites) == attachment.parameter_count - head


@each
def test_merged_equals_unmerged(name: str, architecture: str, task: Task) -> None:
    """Breaks when a factor is folded wrongly, or a trained head is lost with its adapter."""
    model, _ = attached(name, architecture, task)
    trees = rows(architecture, task)
    adapted = log_probs(model, trees)
    if not {"mergeable", "trains-base"} & method(name).provides:
        with pytest.raises(RecipeError, match="cannot be merged"):
            model.merge()
        return
    model.merge()
    assert not any(isinstance(module, EditedModule) for module in model.module.modules())
    assert forests.relative_error(log_probs(model, trees), adapted) <= 1e-5


@each
def test_saved_and_loaded_is_the_same_bit_for_bit(
    name: str, architecture: str, task: Task, tmp_path: Path
) -> None:
    """Breaks when a tensor of the adapter or of the new head is lost on its way through the files."""
    model, attachment = attached(name, architecture, task)
    trees = rows(architecture, task)
    adapted = log_probs(model, trees)
    folder = save_result(tmp_path, model, attachment, method(name), {})
    if attachment.trains_base:
        again = load_model(str(folder), task=task, precision="float32", device="cpu")
        assert torch.equal(log_probs(again, trees), adapted) and again.fresh == ()
        if task.classifies:
            assert tuple(AutoConfig.from_pretrained(folder).id2label.values()) == task.classes
        return
    assert read_config(folder)["task_type"] == PEFT_TYPES[task.name]
    fresh = task_models.language_model(architecture, task)
    loaded = fresh.attach(saved_adapter(folder, fresh.sites).attach(fresh.sites))
    fill(loaded, folder)
    assert loaded.digest() == attachment.digest()
    assert torch.equal(log_probs(fresh, trees), adapted)


PACKED = [name for name in catalog.names("quantizers") if name != "none"]
BESIDE = [name for name in NAMES if "trains-base" not in method(name).provides]


@pytest.mark.parametrize(("architecture", "task"), [("bert", TEXTS), ("t5", ANSWERS)], ids=["bert", "t5"])
@pytest.mark.parametrize("quantizer", PACKED)
def test_adapters_beside_packed_weights(quantizer: str, architecture: str, task: Task) -> None:
    """Breaks when an encoder's weights stay as they are, an adapter reads codes for numbers, or off is not the base."""
    model = task_models.language_model(architecture, task)
    trees = rows(architecture, task)
    dense = log_probs(model, trees)
    quantize(model, choose("quantizers", Quantizer, quantizer))
    base = log_probs(model, trees)
    assert not torch.equal(base, dense) and any(isinstance(p, PackedWeight) for p in model.module.parameters())
    for name in BESIDE:
        torch.manual_seed(7)
        attachment = model.attach(method(name).attach(model.sites))
        assert torch.equal(log_probs(model, trees), base) != ("learned-root" in method(name).provides), name
        forests.shake(attachment.named_parameters().values())
        forests.engine_loss(model, trees).backward()
        reached = [key for key, each in attachment.named_parameters().items() if each.grad is not None]
        assert len(reached) > 0.8 * len(attachment.named_parameters()), name
        assert not any(p.requires_grad for p in model.module.parameters() if isinstance(p, PackedWeight))
        with model.without_attachments():
            assert torch.equal(log_probs(model, trees), base), name
        model.detach()
        assert torch.equal(log_probs(model, trees), base), name
