"""Intruders: leading singular vectors of a tuned matrix that are like none of the matrix it was tuned from.

Idea: fine-tuning turns and stretches the directions that a matrix has. A low-rank update may also put a new direction
among its strongest ones. Whether one is new is told by its cosine with each direction of the old matrix: all of them,
not just the strongest. Directions whose singular values nearly agree turn into each other freely, so a vector that is
spread over old ones of about its own size is no news; that is told beside the count. A count means something beside
that of a random change of the same size: the same change with rows and columns permuted and signs flipped has its
singular values exactly, and no relation to the old matrix.
Equation: j is an intruder when max_i |<u0_i, u_j>| < epsilon, for j = 1..k; the same with v for the right side.
    random change: D1 P1 dW P2 D2, with permutations P and signs D. Scaled by lambda: W + (lambda - 1) u_j s_j v_j^T.
Source: Shuttleworth, Andreas, Torralba and Sharma, arXiv 2410.21228, definition 3.1, algorithm 1, section 5.
Cost: products of all old vectors with k new ones; the vectors come from `spectra`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from luthier.maths.spectra import Spectrum, Summed, leading, of_factors

Side = Literal["left", "right"]
SIDES: tuple[Side, ...] = ("left", "right")


@dataclass(frozen=True)
class Likeness:
    """How like old ones the leading vectors of a tuned matrix are.

    `cosines` are the largest of each vector, `shares` how much of it lies in old vectors of about its own size.
    """

    tuned: Spectrum
    cosines: dict[Side, Float[Tensor, " k"]]
    shares: dict[Side, Float[Tensor, " k"]]

    def intruders(self, side: Side, epsilon: float) -> Bool[Tensor, " k"]:
        """Which of the vectors are like none of the old ones."""
        return self.cosines[side] < epsilon

    def turned(self, side: Side, epsilon: float) -> Bool[Tensor, " k"]:
        """Which of these lie mostly in old vectors of about their own size: they may only have turned."""
        return self.intruders(side, epsilon) & (self.shares[side] > 0.5)


@torch.no_grad()
def likeness(base: Spectrum, weight: Float[Tensor, "out in"], change: Summed | None, k: int, *, gap: float) -> Likeness:
    """The leading `k` vectors of a tuned matrix beside all of the base's.

    The tuned matrix is `change`, or `weight` itself where there is none. Singular values that differ by less than `gap`
    of their size count as equal.
    """
    matrix = Summed(weight) if change is None else change
    tuned = leading(matrix, min(k, *weight.shape), _start(base, matrix, k))
    near = (base.sizes[:, None] - tuned.sizes[None, :]).abs() <= gap * tuned.sizes[None, :]
    cosines: dict[Side, Tensor] = {}
    shares: dict[Side, Tensor] = {}
    for side, old, new in (("left", base.left, tuned.left), ("right", base.right, tuned.right)):
        all_cosines = (old.t() @ new).abs()
        cosines[side] = all_cosines.amax(0)  # type: ignore[index]
        shares[side] = (all_cosines.square() * near).sum(0)  # type: ignore[index]
    return Likeness(tuned, cosines, shares)


def shuffled(
    down: Float[Tensor, "r in"], up: Float[Tensor, "out r"], generator: torch.Generator
) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
    """The factors of a random change with the very singular values of up @ down."""
    return _mixed(down.t(), generator).t(), _mixed(up, generator)


def shuffled_whole(change: Float[Tensor, "out in"], generator: torch.Generator) -> Float[Tensor, "out in"]:
    """The same of a change that is no product."""
    return _mixed(_mixed(change.t(), generator).t(), generator)


def correction(
    tuned: Spectrum, which: Bool[Tensor, " k"], factor: float
) -> tuple[Float[Tensor, "n in"], Float[Tensor, "out n"]]:
    """Factors of what scales some directions of a tuned matrix by `factor`."""
    left, sizes, right = tuned.left[:, which], tuned.sizes[which], tuned.right[:, which]
    return right.t().contiguous(), ((factor - 1) * sizes * left).contiguous()


def norm_of_factors(down: Float[Tensor, "r in"], up: Float[Tensor, "out r"]) -> float:
    """The Frobenius norm of up @ down, which is not multiplied out."""
    grams = (up.double().t() @ up.double()) * (down.double() @ down.double().t())
    total = float(grams.sum())
    # Rounding may leave a little below zero; what is no number stays none.
    return 0.0 if total <= 0 else math.sqrt(total)


def _start(base: Spectrum, matrix: Summed, k: int) -> Float[Tensor, "in b"]:
    """Where the leading right vectors are likely to be: those of the base, and those of the change."""
    own = base.right[:, : k + 4]
    if matrix.down is None or matrix.up is None:
        return own
    return torch.cat([own, of_factors(matrix.down, matrix.up).right[:, : k + 4]], 1)


def _mixed(rows: Float[Tensor, "n m"], generator: torch.Generator) -> Float[Tensor, "n m"]:
    """Rows in a random order, each with a random sign."""
    order = torch.randperm(len(rows), generator=generator)
    signs = torch.randint(0, 2, (len(rows), 1), generator=generator) * 2 - 1
    return rows[order.to(rows.device)] * signs.to(rows)
