"""Policies that are moved a little: clipped ratios, the distance to a reference, values that follow.

Idea: answers were sampled by a policy that is not quite the one they train. The ratio of both corrects for that, and
where it has left a narrow band in the direction in which the advantage pulls, there is no gradient any more.
Equation: -min(rho A, clip(rho, 1 - low, 1 + high) A); k3 = q/p - log(q/p) - 1 >= 0, an estimate of KL(p || q) on
    samples of p; values: 1/2 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2);
    leash: e = clip((KL - target) / target, -0.2, 0.2), beta <- beta exp(rate e).
Source: Schulman et al., arXiv 1707.06347, equation 7; clip-higher: arXiv 2503.14476, section 3.1; k3: Schulman,
    Approximating KL Divergence (2020); values as in OpenAI baselines and TRL; leash: arXiv 1909.08593, section 2.2.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def clipped_losses(
    ratio: Float[Tensor, " n"], advantage: Float[Tensor, " n"], *, low: float, high: float
) -> Float[Tensor, " n"]:
    """What is to be minimised, for each action that was `ratio` times as likely when it was chosen."""
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def is_clipped(
    ratio: Float[Tensor, " n"], advantage: Float[Tensor, " n"], *, low: float, high: float
) -> Float[Tensor, " n"]:
    """1 where the ratio has left the band in the direction of the advantage, so that no gradient comes."""
    out = ((ratio < 1 - low) & (advantage < 0)) | ((ratio > 1 + high) & (advantage > 0))
    return out.float()


def k3(log_prob: Float[Tensor, " n"], reference: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """How far the policy is from its reference, by one sample of the policy: never below 0, and unbiased."""
    ahead = reference - log_prob
    return ahead.exp() - ahead - 1


def value_losses(
    values: Float[Tensor, " n"], old: Float[Tensor, " n"], returns: Float[Tensor, " n"], *, clip: float
) -> Float[Tensor, " n"]:
    """Squared errors of values, of which none gains by moving further than `clip` from what it was."""
    near = torch.clamp(values, old - clip, old + clip)
    return 0.5 * torch.maximum((values - returns).square(), (near - returns).square())


def adapted_leash(beta: float, kl: float, *, target: float, rate: float) -> float:
    """The factor of the KL penalty after a step whose mean KL was `kl`: longer when it is below the target."""
    error = min(max((kl - target) / target, -0.2), 0.2)
    return beta * math.exp(rate * error)
