"""GAE: generalised advantage estimation, between one step of a value function and the whole return.

Idea: how much better an action was than expected shows at once in the reward and the next state's value (little
variance, and wrong where the values are), or at the end in the whole return (right, and noisy). `lam` blends all of it.
Equation: delta_t = r_t + gamma V_{t+1} - V_t, with V after the last step 0; A_t = delta_t + gamma lam A_{t+1};
    the return that values learn is A_t + V_t.
Source: Schulman et al., arXiv 1506.02438, equations 11 and 16.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def gae(
    rewards: Float[np.ndarray, " T"], values: Float[np.ndarray, " T"], *, gamma: float, lam: float
) -> tuple[Float[np.ndarray, " T"], Float[np.ndarray, " T"]]:
    """The advantage of each step of an episode that ends with its last one, and the return from there on."""
    exact = values.astype(np.float64)
    after = np.append(exact[1:], 0.0)
    deltas = rewards.astype(np.float64) + gamma * after - exact
    advantages = np.zeros_like(exact)
    coming = 0.0
    for step in range(len(exact) - 1, -1, -1):
        coming = float(deltas[step]) + gamma * lam * coming
        advantages[step] = coming
    return advantages, advantages + exact
