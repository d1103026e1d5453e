"""Spectra: singular values and vectors of matrices, whole or only the leading ones, and what they say in one number.

Idea: the leading singular vectors of a matrix W + B A need no decomposition of that sum. A block of vectors that is
multiplied by W^T W + ... again and again turns towards them, and the products are those of W with a few vectors and of
two thin factors. All blocks that were seen on the way are kept, the best approximation in their span is taken (block
Krylov), and one that begins at the vectors of W itself has little left to turn.
Equation: range of [X, M^T M X, ..., (M^T M)^q X] = Q; M Q = P S R^T; u = P, sigma = S, v = Q R.
    effective rank = exp(-sum_i p_i ln p_i), p_i = sigma_i / sum_j sigma_j; stable rank = sum sigma_i^2 / sigma_1^2.
Source: Musco and Musco, arXiv 1504.05477, algorithm 2 (block Krylov); Roy and Vetterli, EUSIPCO 2007, section 2
    (effective rank); Rudelson and Vershynin, arXiv math/0503442 (stable rank).
Cost: for the leading k of an m x n matrix about 4 m n (k + 12) FLOPs a step, some tens of steps; a whole decomposition
    is about 20 m n min(m, n).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

SPARE = 8
"""Vectors beside those that are asked for: the slowest to converge are not needed."""
STEPS = 5
"""Blocks behind the first before the best of all is taken."""
CYCLES = 40
DENSE_BELOW = 320
"""A matrix whose smaller side is below this is decomposed whole: that is as fast."""


@dataclass(frozen=True)
class Spectrum:
    """Singular vectors as columns, and the singular values, largest first."""

    left: Float[Tensor, "out n"]
    sizes: Float[Tensor, " n"]
    right: Float[Tensor, "in n"]

    def first(self, count: int) -> Spectrum:
        """The leading part of it."""
        return Spectrum(self.left[:, :count], self.sizes[:count], self.right[:, :count])


@dataclass(frozen=True)
class Summed:
    """A matrix plus a product of two thin ones, which is never added up; `up` holds the scale of the product."""

    weight: Float[Tensor, "out in"]
    down: Float[Tensor, "r in"] | None = None
    up: Float[Tensor, "out r"] | None = None

    def times(self, x: Float[Tensor, "in b"]) -> Float[Tensor, "out b"]:
        """The matrix times a block."""
        y = self.weight @ x
        return y if self.down is None or self.up is None else y + self.up @ (self.down @ x)

    def transposed_times(self, y: Float[Tensor, "out b"]) -> Float[Tensor, "in b"]:
        """Its transpose times a block."""
        x = self.weight.t() @ y
        return x if self.down is None or self.up is None else x + self.down.t() @ (self.up.t() @ y)

    def whole(self) -> Float[Tensor, "out in"]:
        """The sum as one matrix."""
        return self.weight if self.down is None or self.up is None else self.weight + self.up @ self.down


def decomposed(weight: Float[Tensor, "out in"]) -> Spectrum:
    """All singular values and vectors of a matrix."""
    left, sizes, right = torch.linalg.svd(weight.float(), full_matrices=False)
    return Spectrum(left, sizes, right.t())


def of_factors(down: Float[Tensor, "r in"], up: Float[Tensor, "out r"]) -> Spectrum:
    """The singular values and vectors of up @ down, from decompositions of the thin factors alone."""
    left, inner_left = torch.linalg.qr(up.float())
    right, inner_right = torch.linalg.qr(down.float().t())
    middle = decomposed(inner_left @ inner_right.t())
    return Spectrum(left @ middle.left, middle.sizes, right @ middle.right)


@torch.no_grad()
def leading(
    matrix: Summed, count: int, start: Float[Tensor, "in b"] | None = None, *, tolerance: float = 1e-5
) -> Spectrum:
    """The `count` largest singular values of a matrix and their vectors.

    `start` holds vectors that are near the right ones. Converged means that M^T u - sigma v is below `tolerance` times
    the largest singular value for each of them; what does not converge is decomposed whole.
    """
    outputs, inputs = matrix.weight.shape
    if min(outputs, inputs) <= max(DENSE_BELOW, 4 * (count + SPARE)):
        return decomposed(matrix.whole()).first(count)
    block = _started(start, inputs, count + SPARE, matrix.weight)
    for _ in range(CYCLES):
        found = _krylov(matrix, block)
        kept = found.first(count)
        rest = matrix.transposed_times(kept.left) - kept.right * kept.sizes
        if bool((rest.norm(dim=0) <= tolerance * found.sizes[0]).all()):
            return kept
        block = found.right[:, : count + SPARE]
    return decomposed(matrix.whole()).first(count)


def effective_rank(sizes: Float[Tensor, " n"]) -> float:
    """How many singular values a matrix has, where small ones count little; 0 for a matrix of zeros."""
    total = float(sizes.double().sum())
    if total <= 0 or not math.isfinite(total):
        return 0.0
    shares = sizes.double() / total
    return float(torch.exp(-(shares * torch.log(shares.clamp_min(1e-300))).sum()))


def stable_rank(sizes: Float[Tensor, " n"]) -> float:
    """The squared Frobenius norm over the squared spectral norm; 0 for a matrix of zeros."""
    largest = float(sizes.max()) if sizes.numel() else 0.0
    return float((sizes.double() / largest).square().sum()) if largest > 0 else 0.0


def _started(start: Tensor | None, inputs: int, count: int, like: Tensor) -> Float[Tensor, "in b"]:
    """Orthonormal vectors to begin with: those that are given, and random ones, so that no direction is left out."""
    random = torch.randn(inputs, SPARE if start is not None else count, generator=torch.Generator().manual_seed(0))
    random = random.to(like)
    return torch.linalg.qr(random if start is None else torch.cat([start.to(like), random], 1))[0]


def _krylov(matrix: Summed, block: Float[Tensor, "in b"]) -> Spectrum:
    """The best approximation in the span of the block and of what powers of M^T M make of it."""
    basis, images = block, [matrix.times(block)]
    latest = block
    for _ in range(STEPS):
        if basis.shape[1] + latest.shape[1] > min(matrix.weight.shape):
            break
        latest = matrix.transposed_times(images[-1])
        # Twice: once leaves as much of the old blocks as rounding does.
        for _again in range(2):
            latest = latest - basis @ (basis.t() @ latest)
            latest = torch.linalg.qr(latest)[0]
        basis = torch.cat([basis, latest], 1)
        images.append(matrix.times(latest))
    outer, inner = torch.linalg.qr(torch.cat(images, 1))
    small = decomposed(inner)
    return Spectrum(outer @ small.left, small.sizes, basis @ small.right)
