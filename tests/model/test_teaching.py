"""Whole distributions compared a few rows at a time: the same divergences and gradients as with all logits at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from luthier.adapters.full import Full
from luthier.adapters.lora import LoRA
from luthier.core.errors import RecipeError
from luthier.data.forest import Forest, Segment, Tree
from luthier.maths.divergences import Comparison, divergences
from luthier.model.language_model import LanguageModel
from luthier.model.teaching import by_rows, compared_outputs, taught
from tests import forests

TEMPERATURE = 0.8


def forest(seed: int = 0, rows: int = 2) -> Forest:
    """Prompts with two answers each, and a plain row."""
    rng = np.random.default_rng(seed)
    made = []
    for row in range(rows):
        root = Segment(forests.tokens(rng, 4), np.zeros(4, np.float32))
        leaves = [Segment(forests.tokens(rng, size), np.ones(size, np.float32), 0) for size in (3, 5)]
        made.append(Tree((root, *leaves), row=row))
    return Forest((*made, Tree((Segment(forests.tokens(rng, 6), np.ones(6, np.float32)),), row=rows)))


def brute(model: LanguageModel, trees: Forest, **more: Any) -> torch.Tensor:
    """The log-probabilities over the vocabulary at each weighted token, by the zoo's model on plain rows."""
    found = []
    for tree in trees.trees:
        for path in tree.paths():
            ids = np.concatenate([tree.segments[index].tokens for index in path])
            weighted = np.concatenate([tree.segments[index].weighted for index in path])
            logits = model.module(torch.from_numpy(ids.astype(np.int64))[None], **more).logits[0].float()
            found.append(torch.log_softmax(logits / TEMPERATURE, -1)[np.flatnonzero(weighted) - 1])
    return torch.cat(found)


@pytest.mark.parametrize("comparison", [Comparison("forward"), Comparison("reverse"), Comparison("jsd", 0.3)])
@pytest.mark.parametrize("adapter", [LoRA(), Full()], ids=["lora", "full"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_divergences_and_gradients_are_those_of_whole_logits(
    architecture: str, adapter: Any, comparison: Comparison
) -> None:
    """Breaks when a chunk is another row's, the head's own gradient is lost, or a temperature is not the teacher's."""
    model, teacher = forests.language_model(architecture), forests.language_model(architecture, seed=5)
    torch.manual_seed(0)
    parameters = list(model.attach(adapter.attach(model.sites)).named_parameters().values())
    forests.shake(parameters, seed=3)
    trees = forest()
    told = taught(teacher, trees, temperature=TEMPERATURE)
    outputs = compared_outputs(model, trees, told, comparison, temperature=TEMPERATURE)
    assert outputs.divergences is not None
    scales = torch.linspace(0.5, 2, len(outputs.divergences))
    ours = torch.autograd.grad((outputs.divergences * scales).sum(), parameters, allow_unused=True)
    student = brute(model, trees)
    wanted = divergences(student, brute(teacher, trees).detach(), comparison)
    theirs = torch.autograd.grad((wanted * scales).sum(), parameters, allow_unused=True)
    torch.testing.assert_close(outputs.divergences, wanted, rtol=1e-4, atol=1e-5)
    said = model.token_outputs(trees, temperature=TEMPERATURE).log_probs
    torch.testing.assert_close(outputs.log_probs, said, rtol=1e-5, atol=1e-5)
    for one, other in zip(ours, theirs, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-5)


def test_a_model_that_cannot_be_driven_is_compared_too() -> None:
    """Breaks when the states of unrolled paths stand in another order than the forest's tokens."""
    recurrent, teacher = forests.language_model("llama"), forests.language_model("llama", seed=5)
    trees = forest(rows=1)
    told = taught(teacher, trees, temperature=1.0)
    with torch.no_grad():
        segments = compared_outputs(recurrent, trees, told, Comparison("reverse"), temperature=1.0).divergences
        recurrent.executor = type(recurrent.executor)("unrolled", True, recurrent.executor.backend)
        unrolled = compared_outputs(recurrent, trees, told, Comparison("reverse"), temperature=1.0).divergences
    assert segments is not None and unrolled is not None
    torch.testing.assert_close(unrolled, segments, rtol=1e-5, atol=1e-6)


def test_padding_at_the_end_of_a_vocabulary_does_not_count() -> None:
    """Breaks when a teacher with more rows than the student has tokens cannot be met, or its padding has a share."""
    model, teacher = forests.language_model("llama"), forests.language_model("llama")
    head = teacher.module.get_output_embeddings()
    more = torch.nn.Linear(head.in_features, head.out_features + 8, bias=False)
    with torch.no_grad():
        more.weight[: head.out_features] = head.weight
    teacher.module.set_output_embeddings(more)
    trees = forest(rows=1)
    told = taught(teacher, trees, temperature=1.0)
    with torch.no_grad():
        found = compared_outputs(model, trees, told, Comparison("forward"), temperature=1.0).divergences
    assert found is not None and found.abs().max() < 1e-6


def test_chunks_of_any_size_give_the_same() -> None:
    """Breaks when a row's number depends on its neighbours."""
    states = torch.randn(7, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))

    def rule(rows: torch.Tensor, which: slice) -> torch.Tensor:
        logits = torch.log_softmax(rows @ weight.t(), -1)
        return torch.stack([logits.exp().square().sum(-1), logits[:, 0]], 1)

    whole = by_rows(states, rule, chunk_rows=7)
    parts = by_rows(states, rule, chunk_rows=2)
    assert torch.equal(whole, parts)
    one, two = (torch.autograd.grad(each[:, 0].sum(), states)[0] for each in (whole, parts))
    torch.testing.assert_close(one, two)


def test_one_adapter_at_a_time() -> None:
    """Breaks when rows of several adapters are compared as if they were one's."""
    model = forests.language_model("llama")
    trees = forest(rows=1)
    told = taught(model, trees, temperature=1.0)
    named = Forest(tuple(Tree(tree.segments, row=tree.row, adapter="other") for tree in trees.trees))
    with pytest.raises(RecipeError, match="several adapters"):
        compared_outputs(model, named, told, Comparison("forward"), temperature=1.0)
