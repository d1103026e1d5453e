"""Sketches of tensors: a few numbers that tell how far two tensors are apart when only one of them is at hand.

Idea: the elements, each with a random sign that depends on its place alone, are summed up in a few buckets (a count
sketch). The difference of two sketches is the sketch of the difference, and its length is, on average, that of the
difference itself. So what a tensor was can be remembered in a hundred bytes, and a tensor that was scaled, permuted or
replaced is found out.
Source: Charikar, Chen, Farach-Colton, Finding Frequent Items in Data Streams, 2002; Alon, Matias, Szegedy, 1996, for
the length.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Final, final

import numpy as np
import torch
from jaxtyping import Float, Int8
from torch import Tensor

from luthier.kernels.vectors import BUCKETS, Vectors, vectors_for
from luthier.kernels.wanted import wanted_kernels
from luthier.model.files.array_views import array_of

_SIGNS: Final = BUCKETS * 4093
"""After so many elements the signs begin again."""


@final
@dataclass(frozen=True)
class Sketch:
    """The shape of a tensor, its norm, and its sums with random signs."""

    shape: tuple[int, ...]
    norm: float
    sums: Float[np.ndarray, " buckets"]

    def apart(self, other: Sketch) -> float:
        """About the norm of the difference of the two tensors, as a share of this one's; infinite for other shapes."""
        if self.shape != other.shape:
            return float("inf")
        length = float(np.linalg.norm(self.sums - other.sums))
        return length / self.norm if self.norm else float("inf") if length else 0.0

    def difference(self, other: Sketch) -> str:
        """What is to be said of the other tensor, behind its name."""
        if self.shape != other.shape:
            return f"has shape {list(other.shape)}, not {list(self.shape)}"
        ratio = other.norm / self.norm if self.norm else float("inf")
        scaled = float(np.linalg.norm(self.sums * ratio - other.sums)) < 0.02 * other.norm if ratio else True
        if scaled and abs(ratio - 1) > 0.001:
            return f"is {ratio:.4g} times what it was"
        return f"differs by about {self.apart(other):.2g} of its norm ({self.norm:.3g}, now {other.norm:.3g})"


@torch.no_grad()
def sketched(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Sketch]:
    """A sketch of each tensor, one at a time."""
    found, vectors = {}, vectors_for(wanted_kernels())
    for name, tensor in tensors:
        growing = Sketching(vectors)
        growing.add(array_of(tensor.cpu()))
        found[name] = growing.sketch(tuple(tensor.shape))
    return found


@final
class Sketching:
    """A sketch that grows while the elements of a tensor pass, in their order, in pieces of any size."""

    def __init__(self, vectors: Vectors) -> None:
        self._vectors = vectors
        self.count, self.square = 0, 0.0
        self.sums = np.zeros(BUCKETS)

    def add(self, piece: np.ndarray) -> None:
        """The next elements."""
        flat = piece.reshape(-1)
        self.square += self._vectors.signed_sums(flat, _signs(), self.sums, at=self.count)
        self.count += len(flat)

    def sketch(self, shape: tuple[int, ...]) -> Sketch:
        """The sketch of what has passed, a tensor of this shape."""
        return Sketch(shape, self.square**0.5, self.sums)


@cache
def _signs() -> Int8[np.ndarray, " period"]:
    draws = torch.Generator().manual_seed(0)
    return array_of((torch.randint(0, 2, (_SIGNS,), generator=draws) * 2 - 1).to(torch.int8))
