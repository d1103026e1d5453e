"""GRPO and its kin against trl, against REINFORCE, and against itself, cut up and unshared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from luthier.data.forest import Forest, Segment, Tree
from luthier.data.rollouts import Answer, Group, noting
from luthier.objectives.grpo import GRPO, KIN
from luthier.train.stepper import Stepper
from tests import rollouts

each_kin = pytest.mark.parametrize("preset", KIN)

# What trl 1.16.0 says of these numbers: GRPOTrainer._compute_loss (max_completion_length 6) and RLOOTrainer's, with
# _get_per_token_logps_and_entropies giving NEW and everything else below as `inputs`, called in trl's own environment.
NEW = [[-1.0, -0.5, -2.0, -0.1], [-0.3, -1.2], [-2.2, -0.7, -0.9]]
OLD = [[-1.1, -0.8, -1.7, -0.1], [-0.9, -1.1], [-2.0, -0.9, -0.4]]
REFERENCE = [[-1.5, -0.5, -1.0, -0.2], [-0.4, -1.6], [-2.5, -0.6, -1.1]]
SAMPLED = [[-1.3, -0.8, -2.9, -0.1], [-0.9, -1.3], [-2.0, -0.7, -0.4]]
REWARDS = [1.0, 0.25, 0.0]
TRL = {
    "grpo": 0.02383476495742798,
    "dr_grpo": -0.040126606822013855,
    "dapo": -0.16414158046245575,
    "gspo": 0.030084988102316856,
    "rloo": -0.01828145980834961,
}
TRL_CORRECTED = -0.07720299810171127
"""grpo with `importance_sampling_ratio` = min(exp(OLD - SAMPLED), 2)."""


def given_tree(objective: GRPO) -> Tree:
    """The answers of the comparison."""
    answers = tuple(
        Answer(np.arange(len(told), dtype=np.int32), np.ones(len(told), np.bool_), np.array(told, np.float32), reward)
        for told, reward in zip(SAMPLED, REWARDS, strict=True)
    )
    group = Group(np.arange(3, dtype=np.int32), answers)
    tree = objective.grow(group)
    for note, values in (("old", OLD), ("reference", REFERENCE)):
        tree = noting(tree, note, [np.array(each) for each in values])  # type: ignore[arg-type]
    [tree], _ = objective.credited([group], [tree], leash=0.0)
    return tree


def loss_of(objective: GRPO) -> float:
    outputs, forest = rollouts.outputs_of(given_tree(objective), [each for own in NEW for each in own])
    report = objective.loss(outputs, forest)
    return float(report.sum.detach()) / report.weight


@each_kin
def test_the_loss_is_trls(preset: Any) -> None:
    """Breaks when a weight, a ratio, a band or an advantage is another than in the reference implementation."""
    assert loss_of(GRPO(preset=preset, longest=6)) == pytest.approx(TRL[preset], abs=1e-6)


def test_truncated_importance_weights_are_trls() -> None:
    """Breaks when the correction also scales the KL, or is not cut off."""
    assert loss_of(GRPO(preset="grpo", correction=2.0)) == pytest.approx(TRL_CORRECTED, abs=1e-6)


def reinforce(stepper: Stepper, objective: GRPO, trees: list[Tree]) -> dict[str, torch.Tensor]:
    """The gradient of -sum_t w_t A log pi over the weights, written out."""
    forest = Forest(tuple(trees))
    outputs = stepper.model.token_outputs(forest)
    scale = torch.ones(len(outputs.weights))
    if objective.preset in ("dr_grpo", "rloo"):
        sizes = [int(leaf.weighted.sum()) for tree in trees for leaf in tree.segments[1:]]
        lengths = torch.tensor([size for size in sizes for _ in range(size)], dtype=torch.float32)
        # The sum over an answer, over a constant or as it is; for the mean over it weights are 1 / |o|.
        scale = lengths / objective.longest if objective.preset == "dr_grpo" else lengths
    loss = -(outputs.weights * scale * outputs.notes["advantage"] * outputs.log_probs).sum() / forest.weight
    names = list(stepper.parameters)
    found = torch.autograd.grad(loss, [stepper.parameters[name] for name in names])
    return dict(zip(names, found, strict=True))


def gradients(stepper: Stepper, trees: list[Tree]) -> dict[str, torch.Tensor]:
    """What one step would be divided by its weight."""
    stepper.forward_backward(trees)
    weight = stepper.pending_weight
    found = {name: each.grad / weight for name, each in stepper.masters.items() if each.grad is not None}
    stepper.zero_grad()
    return found


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert set(found) == set(expected)
    most = max(float(each.abs().max()) for each in expected.values())
    assert most > 1e-6
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max()) <= tolerance * most, name


@each_kin
def test_the_first_step_is_reinforce(preset: Any) -> None:
    """Breaks when the ratio is not 1 at first, something is clipped, or an advantage reaches other tokens."""
    objective = GRPO(preset=preset, beta=0.0)
    stepper = rollouts.stepper_for(objective)
    trees = rollouts.random_trees(objective)
    report = stepper.forward_backward(trees)
    stepper.zero_grad()
    assert report.figures["ratio"] == 1.0 and report.figures["clipped"] == 0.0
    assert_close(gradients(stepper, trees), reinforce(stepper, objective, trees))


@each_kin
@pytest.mark.parametrize("micro_tokens", [1, 40])
def test_cutting_a_step_up_changes_no_gradient(preset: Any, micro_tokens: int) -> None:
    """Breaks when a normaliser is that of a micro-batch; at 1 token each answer of a tree is a part of its own."""
    objective = GRPO(preset=preset, beta=0.1)
    trees = [with_old(tree) for tree in rollouts.random_trees(objective)]
    whole = gradients(rollouts.stepper_for(objective), trees)
    assert_close(gradients(rollouts.stepper_for(objective, micro_tokens=micro_tokens), trees), whole)


@each_kin
def test_a_shared_prompt_is_many_prompts(preset: Any) -> None:
    """Breaks when what a leaf is given depends on its neighbours, or the prompt's own gradient is lost."""
    objective = GRPO(preset=preset, beta=0.1)
    trees = [with_old(tree) for tree in rollouts.random_trees(objective)]
    alone = [Tree((tree.segments[0], leaf), row=tree.row) for tree in trees for leaf in tree.segments[1:]]
    stepper = rollouts.stepper_for(objective)
    assert_close(gradients(stepper, alone), gradients(stepper, trees))


def with_old(tree: Tree) -> Tree:
    """The tree with old log-probabilities that are some way from the model's."""
    return noting(tree, "old", list(_told(tree)))


def _told(tree: Tree) -> Iterator[np.ndarray]:
    for leaf in tree.segments[1:]:
        assert leaf.notes is not None
        yield leaf.notes["sampled"][leaf.weighted] - 0.1


def test_what_others_said_is_context() -> None:
    """Breaks when an environment's tokens get a weight, or count for the length of an answer."""
    own = np.array([True, False, False, True])
    answer = Answer(np.arange(4, dtype=np.int32), own, np.zeros(4, np.float32), 1.0)
    tree = GRPO(preset="grpo").grow(Group(np.arange(2, dtype=np.int32), (answer, replace(answer, trained=False))))
    leaf: Segment = tree.segments[1]
    assert len(tree.segments) == 2 and leaf.weights.tolist() == [0.5, 0, 0, 0.5]
