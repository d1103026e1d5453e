"""ORPO: against finite differences through a model, identical pairs, and the mean of an answer's own tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from luthier.data.forest import Forest
from luthier.objectives.orpo import ORPO
from tests import forests, task_models


def pair(row: int = 0) -> Forest:
    view = task_models.answered(forests.views(row + 1, seed=3)[row], np.random.default_rng(row), answers=2)
    return Forest(tuple(ORPO().trees(view)))


def test_the_loss_is_that_of_the_paper() -> None:
    """Breaks when a mean is over both answers, or the odds are of the whole answer."""
    model = forests.language_model("llama")
    forest = pair()
    said = model.token_outputs(forest)
    sizes = [len(leaf.tokens) for leaf in forest.trees[0].segments[1:]]
    better, worse = (each.mean().double() for each in said.log_probs.split(sizes))
    odds = torch.log(better.exp() / (1 - better.exp())) - torch.log(worse.exp() / (1 - worse.exp()))
    expected = -better + 0.7 * -torch.nn.functional.logsigmoid(odds)
    report = ORPO(odds=0.7).loss(said, forest)
    assert float(report.sum.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert report.metrics["chosen_log_prob"][0] == pytest.approx(float(better.detach()), rel=1e-5)


def test_two_equal_answers_have_the_odds_loss_of_a_coin() -> None:
    """Breaks when the odds of equal answers differ."""
    forest = pair()
    prompt, better, _ = forest.trees[0].segments
    same = Forest((replace(forest.trees[0], segments=(prompt, better, better)),))
    model = forests.language_model("llama")
    with_odds, without = (ORPO(odds=odds).loss(model.token_outputs(same), same).sum for odds in (1.0, 0.0))
    assert float((with_odds - without).detach()) == pytest.approx(math.log(2), rel=1e-5)


def test_its_gradient_is_a_finite_difference() -> None:
    """Breaks when some part of the loss does not reach the model."""
    model = forests.language_model("llama")
    forest, method = pair(1), ORPO(odds=1.0)
    weight = model.module.get_submodule("model.layers.0.mlp.down_proj").weight
    weight.requires_grad_(True)
    method.loss(model.token_outputs(forest), forest).sum.backward()  # type: ignore[no-untyped-call]
    assert isinstance(weight, torch.Tensor) and weight.grad is not None
    direction = torch.sign(weight.grad)
    along, step = float((weight.grad * direction).sum()), 2e-3
    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            weight += sign * step * direction
            ends.append(float(method.loss(model.token_outputs(forest), forest).sum))
            weight -= sign * step * direction
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(along, rel=1e-2)
