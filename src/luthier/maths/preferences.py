"""Losses of preferences: how two answers to one prompt, or one answer by itself, are learned from.

Idea: a preference is a coin whose odds are the difference of two hidden scores (Bradley-Terry). A reward model has the
scores themselves; DPO puts in their place how much more likely than its reference a policy finds an answer; ORPO the
log odds of an answer's mean probability; SimPO its mean log-probability. What is then done with the difference is the
same.
Equation: p(a better than b) = sigmoid(s_a - s_b); loss = -log p of what was observed.
Source: Bradley and Terry, Biometrika 39 (1952); DPO: arXiv 2305.18290, equation 7; IPO: arXiv 2310.12036, equation 17;
    hinge: arXiv 2305.10425; ORPO: arXiv 2403.07691, equations 4 to 7; KTO: arXiv 2402.01306, equations 7 and 8.
"""

from __future__ import annotations

import math
from typing import Final, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

PairLoss = Literal["sigmoid", "hinge", "ipo"]
CERTAIN: Final = -1e-6
"""The log of the largest probability that an answer is taken to have: one that is certain has infinite odds."""


def pair_losses(
    difference: Float[Tensor, " P"],
    *,
    kind: PairLoss,
    beta: float = 1.0,
    margin: Float[Tensor, " P"] | float = 0.0,
    flipped: Float[Tensor, " P"] | float = 0.0,
) -> Float[Tensor, " P"]:
    """The loss of each pair whose better answer scores higher by `difference`, which `beta` scales.

    The better one has to be ahead by a `margin` (IPO has a target instead). With the probability `flipped` a pair was
    noted the wrong way round, and the loss is what is expected then.
    """
    right = _one_way(difference, kind, beta, margin)
    if isinstance(flipped, float) and flipped == 0.0:
        return right
    return (1 - flipped) * right + flipped * _one_way(-difference, kind, beta, margin)


def _one_way(
    difference: Float[Tensor, " P"], kind: PairLoss, beta: float, margin: Float[Tensor, " P"] | float
) -> Float[Tensor, " P"]:
    if kind == "sigmoid":
        return -logsigmoid(beta * difference - margin)
    if kind == "hinge":
        return relu(1 + margin - beta * difference)
    return (difference - 1 / (2 * beta)).square()


def log_odds(log_prob: Float[Tensor, " A"]) -> Float[Tensor, " A"]:
    """log(P / (1 - P)) of probabilities given by their logarithm."""
    return log_prob - log1mexp(log_prob.clamp(max=CERTAIN))


def log1mexp(x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """log(1 - e^x) for x < 0, exact at both ends (Maechler, 2012: the two forms change over at log 2)."""
    near = x > -math.log(2)
    # Each form sees only numbers it is exact for: a gradient through the other one would not be a number.
    close = torch.where(near, x, torch.full_like(x, -1.0))
    far = torch.where(near, torch.full_like(x, -1.0), x)
    return torch.where(near, (-torch.expm1(close)).log(), torch.log1p(-far.exp()))


def kto_losses(
    log_ratio: Float[Tensor, " A"],
    good: Bool[Tensor, " A"],
    *,
    beta: float,
    point: Float[Tensor, " A"] | float,
    desirable: float = 1.0,
    undesirable: float = 1.0,
) -> Float[Tensor, " A"]:
    """Kahneman-Tversky: what each answer lacks of its full value, seen from the reference `point` (a KL, not below 0).

    A good answer gains as it becomes likelier than the point, a bad one as it becomes less likely.
    """
    gain = torch.where(good, log_ratio - point, point - log_ratio)
    weights = torch.where(good, desirable, undesirable)
    return weights * (1 - torch.sigmoid(beta * gain))
