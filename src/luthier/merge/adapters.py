"""Several LoRA adapters as one, by their factors: no weight of the model's size is ever made.

Idea: with Q_u and Q_d orthonormal bases of all columns of the second factors and all rows of the first ones, every
change is Q_u C_i Q_d^T with a small core C_i, and lengths and angles of changes are those of their cores. So methods
that give a weighted sum (linear, slerp, karcher) are applied to the cores, and are what they would be on whole weights.
Methods that treat numbers one by one (ties, dare, ...) depend on the basis; they are applied to the parts V_i of the
shared singular basis [D_1 ... D_n] = U S [V_1 ... V_n]^T, where changes are aligned. The result is cut to a rank by the
singular values of its core, and what that loses is told.
Equation: D_i = w_i B_i A_i; B = [B_1 ... B_n] = Q_u R_u, A^T = Q_d R_d, C_i = R_u,i R_d,i^T; D = Q_u C Q_d^T;
    of rank r: C = X S Y^T, B' = Q_u X_r S_r, A' = Y_r^T Q_d^T
Source: Stoica et al., "Model merging with SVD to tie the KnOTS", arXiv 2410.19735, section 4 (the shared basis).
    Concatenation and SVD of LoRA are as in PEFT's `cat` and `svd`.
Cost: QR of (in + out) x R numbers and SVD of R x R, R the sum of the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, final

import numpy as np
from jaxtyping import Float

from luthier.core.errors import RecipeError
from luthier.maths.numbered_draws import key_of
from luthier.merge.lora import Factors
from luthier.mergers import Merger, Part, Rows, WeightedSum

CAT: Final = "cat"
SVD: Final = "svd"
Pair = tuple[Rows, Rows]
"""The factors of a product: (k, in) and (out, k)."""
_LEAST: Final = 1e-6
"""Directions of the shared basis with less of the largest singular value than this are rounding."""


@final
@dataclass(frozen=True)
class Joined:
    """The merged factors of one module, and squares of norms: of the merged change, and of what the rank cut off."""

    factors: Factors
    whole: float
    lost: float


@final
@dataclass(frozen=True)
class Joining:
    """What is merged: the factors of each module by adapter, their weights, and a method where it is no plain sum."""

    pairs: Sequence[Mapping[str, Factors]]
    weights: Sequence[float]
    method: Merger | None

    @property
    def modules(self) -> list[str]:
        """Every module that an adapter changes."""
        return sorted({module for each in self.pairs for module in each})

    def of(self, module: str) -> list[Factors]:
        """The factors of one module; an adapter that does not change it counts with a change of zero."""
        like = next(each[module] for each in self.pairs if module in each)
        down, up = (np.zeros(shape, np.float32) for shape in ((1, like.down.shape[1]), (len(like.up), 1)))
        nothing = Factors(down, up, like.transposed)
        return [each.get(module, nothing) for each in self.pairs]

    def joined(self, module: str, rank: int | None) -> Joined:
        """The factors of one module as one, cut to a rank where there is one."""
        return joined(module, self.of(module), self.weights, self.method, rank)


def joined(
    name: str, parts: Sequence[Factors], weights: Sequence[float], method: Merger | None, rank: int | None
) -> Joined:
    """The factors of one module in all adapters as one; without a `method` their weighted sum.

    Without a `rank` none is cut off. Raises RecipeError for factors of different shapes.
    """
    shapes = [part.shape for part in parts]
    if len(set(shapes)) != 1 or len({part.transposed for part in parts}) != 1:
        raise RecipeError(f"{name} has the shapes {shapes} in the adapters", allowed="adapters of one model")
    if method is None:
        scaled = [part.up * weight for part, weight in zip(parts, weights, strict=True)]
        down, up = np.concatenate([part.down for part in parts]), np.concatenate(scaled, 1)
        if rank is None:
            return Joined(Factors(down, up, parts[0].transposed), _square(down, up), 0.0)
        return _cut(down, up, rank, parts[0])
    if isinstance(method, WeightedSum):
        down, up = _by_cores(name, parts, weights, method)
    else:
        down, up = _in_shared_basis(name, parts, weights, method)
    return _cut(down, up, rank or max(len(part.down) for part in parts), parts[0])


def _by_cores(name: str, parts: Sequence[Factors], weights: Sequence[float], method: Merger) -> Pair:
    """Merge the cores: exact for what is a weighted sum with weights that inner products tell."""
    left, columns = np.linalg.qr(_wide(np.concatenate([part.up for part in parts], 1)))
    right, rows = np.linalg.qr(_wide(np.concatenate([part.down for part in parts]).T))
    cores, start = [], 0
    for part in parts:
        own = slice(start, start + len(part.down))
        cores.append(_narrow(columns[:, own] @ rows[:, own].T))
        start = own.stop
    core = merged_change(name, cores, weights, method)
    return _narrow(right.T), _narrow(left) @ core


def _in_shared_basis(name: str, parts: Sequence[Factors], weights: Sequence[float], method: Merger) -> Pair:
    """Merge the aligned parts: of each change the coordinates of its rows in the shared left singular basis."""
    left, columns = np.linalg.qr(_wide(np.concatenate([part.up for part in parts], 1)))
    thin, start = [], 0
    for part in parts:
        own = slice(start, start + len(part.down))
        thin.append(columns[:, own] @ _wide(part.down))
        start = own.stop
    sizes, turn = np.linalg.eigh(np.sum([each @ each.T for each in thin], 0))
    lengths = np.sqrt(sizes.clip(min=0))
    there = lengths > _LEAST * max(lengths.max(), np.finfo(np.float64).tiny)
    inverse = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=there)
    aligned = [_narrow(inverse[:, None] * (turn.T @ each)) for each in thin]
    merged = merged_change(name, aligned, weights, method)
    return merged, _narrow(left @ turn * np.where(there, lengths, 0.0))


def merged_change(name: str, changes: Sequence[Rows], weights: Sequence[float], method: Merger) -> Rows:
    """The change that a method makes of changes: they are models whose base is zero."""
    base = np.zeros_like(changes[0])
    return method.whole(Part(tuple(changes), base, tuple(weights), 0, base.size, key_of(name)))


def _cut(down: Float[np.ndarray, "k in"], up: Float[np.ndarray, "out k"], rank: int, like: Factors) -> Joined:
    """The best approximation of `up @ down` of a rank, from thin matrices alone."""
    left, columns = np.linalg.qr(_wide(up))
    right, rows = np.linalg.qr(_wide(down.T))
    one, sizes, other = np.linalg.svd(columns @ rows.T, full_matrices=False)
    kept = min(rank, len(sizes))
    roots = np.sqrt(sizes[:kept])
    new_up = _narrow(left @ one[:, :kept] * roots)
    new_down = _narrow(roots[:, None] * (other[:kept] @ right.T))
    squares = np.square(sizes)
    return Joined(Factors(new_down, new_up, like.transposed), float(squares.sum()), float(squares[kept:].sum()))


def _square(down: Float[np.ndarray, "k in"], up: Float[np.ndarray, "out k"]) -> float:
    """The squared norm of a product, by the inner products of its factors."""
    own, other = _wide(up), _wide(down)
    return max(0.0, float(((own.T @ own) * (other @ other.T)).sum()))


def _wide(numbers: Rows) -> Rows:
    return numbers.astype(np.float64)


def _narrow(numbers: Rows) -> Rows:
    return numbers.astype(np.float32)


def share_lost(found: Sequence[Joined]) -> float:
    """The norm of what was cut off, as a share of that of all changes."""
    whole = math.fsum(each.whole for each in found)
    return math.sqrt(math.fsum(each.lost for each in found) / whole) if whole else 0.0
