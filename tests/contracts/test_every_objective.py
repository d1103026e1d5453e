"""What every objective of the catalog promises on rendered rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from luthier.core import catalog
from luthier.data.forest import Forest, Tree
from luthier.data.rollout_learner import RolloutLearner
from luthier.model.language_model import LanguageModel
from luthier.model.tasks import CAUSAL
from luthier.objectives import Objective
from tests import rollouts, task_models
from tests.contracts.resumption import BREAKS, FEW_BREAKS, Setup, assert_resumes
from tests.tiny import HIDDEN

each = pytest.mark.parametrize("name", catalog.names("objectives"))


def trees_of(method: Objective, count: int = 5) -> list[Tree]:
    """The trees of a few rendered rows, with weights of 0, 0.5 and 1 where an objective does not set them itself."""
    if isinstance(method, RolloutLearner):
        return rollouts.random_trees(method, count)
    rng = np.random.default_rng(3)
    made = []
    for view in task_models.views_for(method, count):
        if method.task(task_models.CLASSES) == CAUSAL and view.answers is None:
            weights = rng.choice([0.0, 0.5, 1.0], len(view.tokens)).astype(np.float32)
            weights[-1] = 1.0
            view = replace(view, weights=weights)
        made.extend(method.trees(view))
    return task_models.with_reference(made) if method.reference else made


def whole_model(method: Objective) -> LanguageModel:
    """The tiny model with what the objective has of its own."""
    model = task_models.model_for(method)
    if own := method.own(HIDDEN, model.device):
        model.attach(own)
    return model


@each
def test_the_loss_is_a_sum_so_that_micro_batches_add_up(name: str) -> None:
    """Breaks when an objective takes a mean over what happens to share a forest."""
    method = task_models.fitting(name)
    model = whole_model(method)
    trees = trees_of(method)
    whole = method.loss(model.token_outputs(Forest(tuple(trees))), Forest(tuple(trees)))
    parts = [method.loss(model.token_outputs(Forest((tree,))), Forest((tree,))) for tree in trees]
    assert whole.sum.item() == pytest.approx(sum(part.sum.item() for part in parts), rel=1e-5)
    assert whole.weight == pytest.approx(sum(part.weight for part in parts)) and whole.weight > 0
    for key, (value, weight) in whole.metrics.items():
        # A part without rows of some kind need not say that it has none.
        told = [part.metrics.get(key, (0.0, 0.0)) for part in parts]
        assert value == pytest.approx(sum(one for one, _ in told), rel=1e-5)
        assert weight == pytest.approx(sum(one for _, one in told))


@each
def test_the_weight_is_known_before_the_first_pass(name: str) -> None:
    """Breaks when the divisor of a step is found out on the way, where devices would have to agree on it."""
    method = task_models.fitting(name)
    model = whole_model(method)
    forest = Forest(tuple(trees_of(method)))
    assert method.loss(model.token_outputs(forest), forest).weight == forest.weight


@each
def test_trees_keep_the_row_they_came_from(name: str) -> None:
    """Breaks when the loss of a row is booked on another."""
    method = task_models.fitting(name)
    assert {tree.row for tree in trees_of(method)} == set(range(5))


@each
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_a_run_that_is_interrupted_goes_on_bit_for_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Breaks when an objective remembers what it has seen, or has trained parts that are not saved."""
    breaks = FEW_BREAKS if dtype == torch.float32 else BREAKS
    assert_resumes(Setup(objective=name, dtype=dtype), tmp_path, breaks=breaks)


@each
def test_the_same_row_gives_the_same_trees_in_the_same_epoch(name: str) -> None:
    """Breaks when trees are drawn from a generator that a resumed run, or a second process, has elsewhere."""
    method = task_models.fitting(name)
    for view in task_models.views_for(method):
        for epoch in (0, 3):
            one, two = (method.trees(view, epoch=epoch) for _ in range(2))
            for left, right in zip(one, two, strict=True):
                for first, second in zip(left.segments, right.segments, strict=True):
                    assert np.array_equal(first.tokens, second.tokens) and np.array_equal(first.weights, second.weights)
