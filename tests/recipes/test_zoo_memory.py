"""What the zoo's blocks keep, told from a few tokens, against what autograd keeps of many."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from luthier.adapters import Adapter
from luthier.arithmetic.counted import Load, Texts
from luthier.core import catalog
from luthier.core.chosen import choose
from luthier.data.forest import Forest
from luthier.model.attending import attention
from luthier.model.kept_tensors import kept_by_stage
from luthier.model.language_model import LanguageModel
from luthier.objectives import Objective, Vocabulary
from luthier.recipes.sizing.zoo_memory import Counted, load_of
from tests import forests, task_models
from tests.arithmetic.test_memory import kept_by_autograd
from tests.recipes.peak_models import SPECIAL, model_for, views_for
from tests.task_models import ANSWERS, TEXTS

WORDS = {"method": "classification", "level": "word"}
KINDS: list[tuple[str, Any]] = [
    ("bert", "masked_lm"), ("bert", "classification"), ("bert", WORDS), ("t5", "seq2seq"), ("t5", "t_few"),
    ("gpt2", "sft"), ("gpt2", "classification"),
]  # fmt: skip
IDS = [f"{kind}-{objective if isinstance(objective, str) else 'words'}" for kind, objective in KINDS]
ADAPTERS = catalog.names("adapters")
TWISTS: list[dict[str, Any]] = [{}, {"dropout": 0.1}, {"precision": "bfloat16"}]
SOME = [("lora", TWISTS[1]), ("full", TWISTS[0]), ("prompt_tuning", TWISTS[2]), ("prefix_tuning", TWISTS[1])]


def adapter_of(name: str) -> Adapter:
    """The method with its defaults; what trains rows of tokens is told which."""
    return choose("adapters", Adapter, {"method": name, "tokens": (3, 4, 5)} if name == "trainable_tokens" else name)


def told_and_true(architecture: str, objective: Any, adapter: str, twist: dict[str, Any]) -> tuple[int, int]:
    """Bytes that a larger pass keeps, as the rates say and as torch says."""
    attention.register()
    fitting = choose("objectives", Objective, objective).with_vocabulary(Vocabulary(512, mask_id=SPECIAL))
    given = {"hidden": 64, "layers": 3, "architecture": architecture, "vocabulary": 512, **twist}
    model = model_for(given, fitting)
    torch.manual_seed(0)
    attachment = model.attach(adapter_of(adapter).attach(model.sites))
    views = views_for(fitting, 12, longest=60)
    forest = Forest(tuple(tree for view in views for tree in fitting.trees(view)))
    return sum(Counted.of(model, attachment).rates.kept(load_of(model, forest))), sum(kept_by_stage(model, forest))


@pytest.mark.parametrize(("adapter", "twist"), SOME, ids=[name for name, _ in SOME])
@pytest.mark.parametrize(("architecture", "objective"), KINDS, ids=IDS)
def test_a_few_tokens_tell_what_many_keep(architecture: str, objective: Any, adapter: str, twist: Any) -> None:
    """Breaks when something is kept that grows with none of the numbers of a load."""
    told, true = told_and_true(architecture, objective, adapter, twist)
    assert told == pytest.approx(true, rel=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("adapter", "twist"), list(product(ADAPTERS, TWISTS)))
@pytest.mark.parametrize(("architecture", "objective"), KINDS, ids=IDS)
def test_every_adapter_tells_what_many_keep(architecture: str, objective: Any, adapter: str, twist: Any) -> None:
    """Breaks when a method of the catalog, also one that is new, keeps what grows with none of the numbers."""
    told, true = told_and_true(architecture, objective, adapter, twist)
    assert told == pytest.approx(true, rel=5e-3)


def lora_on(architecture: str, task: Any) -> LanguageModel:
    model = task_models.language_model(architecture, task)
    model.attach(choose("adapters", Adapter, "lora").attach(model.sites))
    return model


def test_stages_hold_all_that_autograd_keeps() -> None:
    """Breaks when a tensor belongs to no stage, or blocks are taken for others."""
    model = lora_on("bert", TEXTS)
    forest = Forest(tuple(task_models.trees(TEXTS, both_ways=True)))
    stages = kept_by_stage(model, forest)
    assert len(stages) == 2 * model.sites.layers + 1
    assert sum(stages) == kept_by_autograd(model, forest)
    assert stages[1] == pytest.approx(stages[3], rel=0.1) and stages[1] > stages[2]


def test_counting_leaves_no_trace() -> None:
    """Breaks when a plan changes the random numbers of a run, leaves hooks behind, or dropout on."""
    model = lora_on("t5", ANSWERS)
    torch.manual_seed(3)
    before, expected = forests.snapshot(model.module), torch.get_rng_state()
    Counted.of(model, model.attachments["default"])
    assert torch.equal(torch.get_rng_state(), expected) and forests.snapshot(model.module) == before
    assert not model.module.training
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.module.modules())
    assert all(parameter.grad is None for parameter in model.module.parameters())


def test_a_load_says_where_tokens_are() -> None:
    """Breaks when a learned root, or a row that is padded, is forgotten."""
    model = task_models.language_model("t5", ANSWERS)
    forest = Forest(tuple(task_models.trees(ANSWERS, both_ways=True, count=2)))
    (first, *one), (second, *two) = (tree.segments for tree in forest.trees)
    n, m, said = len(first.tokens), len(second.tokens), [len(each.tokens) for each in (*one, *two)]
    assert n == m
    plain = load_of(model, forest)
    assert plain.texts == Texts.of([(2, n, n)]) and plain.answers.tokens == sum(said)
    assert plain.crossed == n * sum(said) and plain.read == 3 * n
    model.attach(choose("adapters", Adapter, {"method": "prompt_tuning", "prompt_tokens": 3}).attach(model.sites))
    assert load_of(model, forest).texts == Texts.of([(2, n + 3, n + 3)])
    model.detach()
    model.attach(choose("adapters", Adapter, {"method": "prefix_tuning", "prefix_tokens": 3}).attach(model.sites))
    prefixed = load_of(model, forest)
    assert prefixed.texts == plain.texts and prefixed.answers == Texts.of([(1, count, count + 3) for count in said])


def test_texts_of_one_size_are_one_call() -> None:
    """Breaks when what is made once for texts of one size is counted for each, or the other way round."""
    texts = Texts.of([(2, 4, 4), (1, 4, 6), (1, 4, 4)])
    assert (texts.rows, texts.tokens, texts.pairs, texts.sizes, texts.calls) == (4, 16, 72, 40, 56)
    assert (texts.joined, texts.joined_pairs, texts.viewed, texts.squares, texts.largest) == (8, 32, 16, 64, 32)
    assert len(Load(texts=texts).numbers) == 1 + 8 + 8 + 3
