"""Generalised advantages against their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.maths.gae import gae


def test_five_steps_by_hand() -> None:
    """Breaks when the recursion runs the wrong way, or a value behind the end is taken."""
    rewards, values = np.array([0.0, 0.0, 1.0, 0.0, 2.0]), np.array([0.5, 0.4, 0.3, 0.2, 0.1])
    # gamma = lam = 1: the return minus the value, whatever the values in between are.
    advantages, returns = gae(rewards, values, gamma=1.0, lam=1.0)
    assert np.allclose(returns, [3, 3, 3, 2, 2]) and np.allclose(advantages, [2.5, 2.6, 2.7, 1.8, 1.9])
    # lam = 0: one step of the value function.
    advantages, _ = gae(rewards, values, gamma=0.9, lam=0.0)
    assert np.allclose(advantages, [0.36 - 0.5, 0.27 - 0.4, 1.18 - 0.3, 0.09 - 0.2, 2 - 0.1])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.99, 1.0), (1.0, 0.0)])
def test_it_is_the_double_sum(gamma: float, lam: float) -> None:
    """Breaks when discounting and blending are mixed up."""
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=9), rng.normal(size=9)
    deltas = [rewards[t] + gamma * (values[t + 1] if t < 8 else 0.0) - values[t] for t in range(9)]
    expected = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, 9)) for t in range(9)]
    advantages, returns = gae(rewards, values, gamma=gamma, lam=lam)
    assert np.allclose(advantages, expected, rtol=0, atol=1e-12)
    assert np.allclose(returns, advantages + values)
