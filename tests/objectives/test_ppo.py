"""PPO's credit and losses against the definitions; the optimum it reaches is in tests/train/test_bandits.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from luthier.core.chosen import choose
from luthier.core.errors import RecipeError
from luthier.data.forest import Forest
from luthier.data.rollouts import leaf_notes, noting
from luthier.maths.gae import gae
from luthier.objectives import Objective
from luthier.objectives.ppo import PPO
from tests import rollouts
from tests.objectives.test_grpo import assert_close, gradients


def bare(objective: PPO, rng: np.random.Generator) -> tuple[list, list]:
    groups = [rollouts.random_group(rng, answers=2, row=row) for row in range(3)]
    trees = [objective.grow(group) for group in groups]
    for note in ("old", "reference", "value"):
        trees = [noting(tree, note, [rng.normal(size=int(leaf.weighted.sum())) for leaf in tree.segments[1:]]) for tree in trees]  # noqa: E501
    return groups, trees


def test_the_reward_is_at_the_last_own_token_and_distance_costs_at_each() -> None:
    """Breaks when KL has the wrong sign, an environment's token is credited, or padding is whitened in."""
    objective = PPO(beta=0.3, lam=0.9, gamma=0.98)
    groups, trees = bare(objective, np.random.default_rng(0))
    made, leash = objective.credited(groups, trees, leash=0.3)
    assert leash == 0.3
    everything: list[np.ndarray] = []
    for group, tree, credited in zip(groups, trees, made, strict=True):
        for answer, leaf, back in zip(group.answers, tree.segments[1:], leaf_notes(credited, "return"), strict=True):
            own = answer.own
            assert leaf.notes is not None
            old, reference, values = (leaf.notes[note][own] for note in ("old", "reference", "value"))
            rewards = -0.3 * (old - reference)
            rewards[-1] += answer.reward
            advantages, returns = gae(rewards, values, gamma=0.98, lam=0.9)
            assert np.allclose(back, returns, atol=1e-5)
            everything.append(advantages)
    flat = np.concatenate(everything)
    noted = np.concatenate([own for tree in made for own in leaf_notes(tree, "advantage")])
    assert np.allclose(noted, (flat - flat.mean()) / flat.std(ddof=1), atol=1e-5)


def test_the_leash_adapts_to_how_far_answers_are_away() -> None:
    """Breaks when the distance is per token, or the leash goes the wrong way."""
    objective = PPO(beta=0.1, target_kl=1.0)
    groups, trees = bare(objective, np.random.default_rng(0))
    far = [noting(tree, "old", [own + 50 for own in leaf_notes(tree, "reference")]) for tree in trees]
    near = [noting(tree, "old", leaf_notes(tree, "reference")) for tree in trees]
    assert objective.credited(groups, far, leash=0.1)[1] == pytest.approx(0.1 * np.exp(0.02))
    assert objective.credited(groups, near, leash=0.1)[1] == pytest.approx(0.1 * np.exp(-0.02))


def test_a_leash_of_nothing_cannot_adapt() -> None:
    """Breaks when a target is taken that is never looked at: 0 times any factor is 0."""
    with pytest.raises(RecipeError, match=r"beta is 0 and target_kl is 1.*set beta to 0\.05, or leave target_kl out"):
        choose("objectives", Objective, {"method": "ppo", "beta": 0, "target_kl": 1})
    assert choose("objectives", Objective, {"method": "ppo", "beta": 0}).needs


def test_the_loss_is_the_mean_over_tokens_of_both_parts() -> None:
    """Breaks when values and policy are divided by other weights, or the value loss is not clipped."""
    objective = PPO(value_factor=0.7, value_clip=0.1)
    [tree] = rollouts.random_trees(objective, 1)
    count = Forest((tree,)).trained_count
    rng = np.random.default_rng(4)
    said, values = (-np.abs(rng.normal(size=count))).tolist(), torch.tensor(rng.normal(size=count), dtype=torch.float32)
    outputs, forest = rollouts.outputs_of(tree, said, values=values)
    report = objective.loss(outputs, forest)
    total = 0.0
    for at in range(count):
        old, advantage, value, to_come = (
            float(outputs.notes[name][at]) for name in ("old", "advantage", "value", "return")  # type: ignore[index]
        )
        ratio = float(np.exp(said[at] - old))
        total += max(-ratio * advantage, -min(max(ratio, 0.8), 1.2) * advantage)
        near = min(max(float(values[at]), value - 0.1), value + 0.1)
        total += 0.7 * 0.5 * max((float(values[at]) - to_come) ** 2, (near - to_come) ** 2)
    assert float(report.sum.detach()) == pytest.approx(total, rel=1e-5) and report.weight == count


@pytest.mark.parametrize("micro_tokens", [1, 40])
def test_cutting_a_step_up_changes_no_gradient(micro_tokens: int) -> None:
    """Breaks when a mean is that of a micro-batch, or the value head sees the states of others."""
    objective = PPO()
    trees = rollouts.random_trees(objective)
    whole = gradients(rollouts.stepper_for(objective), trees)
    assert sum("root" in name for name in whole) == 2, sorted(whole)
    assert_close(gradients(rollouts.stepper_for(objective, micro_tokens=micro_tokens), trees), whole)


def test_without_a_value_head_there_is_nothing_to_learn_from() -> None:
    """Breaks when missing values are taken for 0."""
    [tree] = rollouts.random_trees(PPO(), 1)
    outputs, forest = rollouts.outputs_of(tree, [-1.0] * Forest((tree,)).trained_count)
    with pytest.raises(RecipeError, match="given no values"):
        PPO().loss(outputs, forest)
