"""The scale of a low-rank update, and how the size of what it adds grows with the rank.

Idea: an update gamma B A of more rank adds up more terms. Whether what it adds stays of one size as the rank grows
depends on gamma and on what B is: independent of A, one gradient step from zero, or one step of a sign-like optimizer.
The factors below are exact up to a constant that the rank does not change.
Equation: (a) B random with a fixed variance: gamma sqrt(r); (b) one SGD step from B = 0, same input: gamma^2 r;
    (c) one Adam step from B = 0, same input: gamma r. gamma = alpha / r for LoRA, alpha / sqrt(r) for rsLoRA.
    An update of the same scale at rank r with rsLoRA has alpha_rs = alpha sqrt(r) / r.
Source: Kalajdzievski, arXiv 2312.03732, theorem 3.2 (case b) and section 4; cases a and c are ours.
Cost: none.
"""

from __future__ import annotations

import math
from typing import Final

CASES: Final = ("random", "sgd", "adam")


def scale(rank: int, alpha: float, *, rslora: bool) -> float:
    """What the product of the factors is multiplied by."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def growth(case: str, rank: int, gamma: float) -> float:
    """How large the output of an update is in one of the `CASES`, up to a constant."""
    if case == "random":
        return gamma * math.sqrt(rank)
    return gamma**2 * rank if case == "sgd" else gamma * rank


def alpha_of_same_scale(rank: int, alpha: float) -> float:
    """The alpha of rsLoRA with which an update is multiplied as by LoRA's alpha at this rank."""
    return alpha * math.sqrt(rank) / rank
