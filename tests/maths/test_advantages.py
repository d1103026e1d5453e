"""Advantages of groups against their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.maths.advantages import group_advantages, whitened


@pytest.mark.parametrize("scale", ["none", "group"])
@pytest.mark.parametrize("baseline", ["mean", "others"])
def test_advantages_of_a_group_add_up_to_nothing(baseline: str, scale: str) -> None:
    """Breaks when the baseline is not the group's own, which lets all answers become likelier at once."""
    rewards = np.random.default_rng(1).normal(size=7)
    found = group_advantages(rewards, baseline=baseline, scale=scale)  # type: ignore[arg-type]
    assert abs(found.sum()) < 1e-12 and (np.argsort(found) == np.argsort(rewards)).all()


def test_leaving_one_out_is_the_mean_of_the_others() -> None:
    """Breaks when RLOO's baseline contains the answer itself."""
    rewards = np.array([1.0, 0.0, 0.5, 0.0])
    others = [reward - np.delete(rewards, place).mean() for place, reward in enumerate(rewards)]
    assert np.allclose(group_advantages(rewards, baseline="others"), others)
    assert np.allclose(others, 4 / 3 * group_advantages(rewards))


def test_the_spread_is_the_unbiased_one() -> None:
    """Breaks when ddof is 0, as numpy has it and torch has not."""
    rewards = np.array([1.0, 0.0, 0.0, 0.0])
    assert np.allclose(group_advantages(rewards, scale="group"), (rewards - 0.25) / (0.5 + 1e-4))


@pytest.mark.parametrize("rewards", [[0.7], [0.1, 0.1, 0.1], []])
def test_where_nothing_differs_there_is_no_advantage(rewards: list[float]) -> None:
    """Breaks when an all-equal group is divided by its spread, or rounding of its mean is taken for merit."""
    assert (group_advantages(np.array(rewards), scale="group") == 0).all()


def test_whitening_leaves_mean_and_spread_of_one() -> None:
    """Breaks when the variance is the biased one, or one number alone is divided by nothing."""
    found = whitened(np.random.default_rng(2).normal(3, 5, 40))
    assert abs(found.mean()) < 1e-12 and found.var(ddof=1) == pytest.approx(1, abs=1e-6)
    assert whitened(np.array([4.0])).tolist() == [0.0]
