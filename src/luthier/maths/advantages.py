"""Advantages: how much better than expected an answer was, from the rewards of several answers to one prompt.

Idea: what all answers to a prompt get is no merit of any one of them. Their mean, or the mean of the others, is the
baseline; dividing by the spread of the group makes easy and hard prompts count alike, which favours both over those in
the middle (Dr. GRPO), so it is a choice. What stands on tokens is brought to mean 0 and spread 1 by `whitened`.
Equation: A_i = r_i - mean_j r_j, or r_i - mean_{j != i} r_j = G/(G-1) (r_i - mean_j r_j); then A_i / (std r + 1e-4),
    with the unbiased std over the group.
Source: Shao et al., arXiv 2402.03300, section 4.1.2 (group mean and std); Liu et al., arXiv 2503.20783, section 3.1
    (no std); Ahmadian et al., arXiv 2402.14740, equation 7 (leave one out); 1e-4 as in TRL.
"""

from __future__ import annotations

from typing import Final, Literal

import numpy as np
from jaxtyping import Float

Baseline = Literal["mean", "others"]
Scale = Literal["none", "group"]
FLOOR: Final = 1e-4
"""What is added to the std of a group, so that rewards that differ by rounding alone do not count as much as others."""
_TINY: Final = 1e-8


def group_advantages(
    rewards: Float[np.ndarray, " G"], *, baseline: Baseline = "mean", scale: Scale = "none"
) -> Float[np.ndarray, " G"]:
    """The advantage of each answer of a group, in float64; 0 for one that stands alone, and where all got the same."""
    exact = rewards.astype(np.float64)
    count = len(exact)
    if count < 2 or (exact == exact[0]).all():
        return np.zeros(count)
    centred = exact - exact.mean()
    if baseline == "others":
        centred *= count / (count - 1)
    return centred / (exact.std(ddof=1) + FLOOR) if scale == "group" else centred


def whitened(values: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """The values with mean 0 and (unbiased) variance 1, in float64; only centred where there is one."""
    exact = values.astype(np.float64)
    centred = exact - exact.mean() if len(exact) else exact
    return centred / np.sqrt(exact.var(ddof=1) + _TINY) if len(exact) > 1 else centred
