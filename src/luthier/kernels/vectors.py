"""Inner products, weighted and signed sums of long vectors, in the types they lie in: one pass over memory in C++.

Idea: what merging does to most tensors is two passes over numbers in bfloat16: how long vectors are and what angle they
have, then so much of each. In torch either is a dozen passes over float32 copies. Here tiles are widened in the first
cache, everything is done to them there, and the result is rounded once. See vectors/vectors.cpp for how.
Equation: P_ij = <u_i, u_j>; s = sum_i w_i u_i; told |s - r|^2, |r|^2, r the base or the first vector;
    b_j = sum_{i: i mod 64 = j} sign_{i mod period} u_i.
Cost: one read of each vector, one write of the result.
Use when: float32, bfloat16 or float16 on a CPU with a compiler, up to 16 vectors. Not when: anything else; the twin in
    plain torch does the same, slower. The compiler is asked once for a machine; the library is a small one of its own.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final, final

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from luthier.core.errors import MissingError
from luthier.kernels.native_build import FLAGS, SOURCES, library

KINDS: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BUCKETS: Final = 64
"""Sums that C++ makes of signed numbers."""
MOST: Final = 16
"""Vectors that C++ takes at once."""
_PIECE: Final = 1 << 18
"""Numbers that float32 sums well."""
_FOLDER: Final = Path(__file__).parent / "vectors"


@final
@dataclass(frozen=True)
class Moved:
    """How far a sum is from its reference, `|s - r|^2`; how long that is, `|r|^2`; and where there is a base, how many
    numbers two vectors move in opposite directions."""

    moved: float
    whole: float
    conflicts: float


class Vectors(ABC):
    """What is asked of vectors of one shape. With `based` the last one is what all others come from."""

    in_place: ClassVar[bool] = False
    """Whether it makes no copies of vectors of up to 32 bits."""

    @abstractmethod
    def products(
        self, vectors: Sequence[Float[Tensor, "*shape"]], *, based: bool = False
    ) -> Float[Tensor, "k k"]:
        """All inner products in float64; with `based` those of what the others have changed of it."""

    @abstractmethod
    def weighted(
        self, vectors: Sequence[Float[Tensor, "*shape"]], weights: Sequence[float], *, dtype: torch.dtype,
        based: bool = False,
    ) -> tuple[Float[Tensor, "*shape"], Moved]:  # fmt: skip
        """The weighted sum, computed in float32 and rounded once, and how far it is from the base or the first vector.

        A vector of weight 0 is left out, and one of weight 1 alone comes back bit for bit.
        """

    @abstractmethod
    def signed_sums(
        self, vector: Float[Tensor, " n"], signs: Int8[Tensor, " period"], sums: Float[Tensor, " buckets"], *, at: int
    ) -> float:
        """Add numbers, with the signs of their places, to the buckets of their places; the sum of their squares.

        The first has the place `at`. Signs begin again after the last, buckets too; they divide the number of signs.
        `sums` are in float64, on the CPU.
        """


@final
class TorchVectors(Vectors):
    """In plain torch: every type."""

    def products(
        self, vectors: Sequence[Float[Tensor, "*shape"]], *, based: bool = False
    ) -> Float[Tensor, "k k"]:
        wide = [vector.float() for vector in vectors]
        return gram([vector - wide[-1] for vector in wide[:-1]] if based else wide)

    def weighted(
        self, vectors: Sequence[Float[Tensor, "*shape"]], weights: Sequence[float], *, dtype: torch.dtype,
        based: bool = False,
    ) -> tuple[Float[Tensor, "*shape"], Moved]:  # fmt: skip
        wide = [vector.float() for vector in vectors]
        found = combined(wide, weights)
        return found.to(dtype), moved(found, wide, based=based)

    def signed_sums(
        self, vector: Float[Tensor, " n"], signs: Int8[Tensor, " period"], sums: Float[Tensor, " buckets"], *, at: int
    ) -> float:
        square, buckets = 0.0, len(sums)
        own = signs.to(vector.device, torch.float32)
        while len(vector):
            at %= len(signs)
            plain, vector = vector[: len(signs) - at].float(), vector[len(signs) - at :]
            square += float(plain.square().sum(dtype=torch.float64))
            front = at % buckets
            behind = -(front + len(plain)) % buckets
            signed = torch.nn.functional.pad(plain * own[at : at + len(plain)], (front, behind))
            sums += signed.view(-1, buckets).sum(0, dtype=torch.float64).cpu()
            at += len(plain)
        return square


@final
class NativeVectors(Vectors):
    """In C++. What it has no types for, its twin does."""

    in_place: ClassVar[bool] = True

    def __init__(self, loaded: ctypes.CDLL) -> None:
        self._products, self._weighted, self._twin = loaded.vector_products, loaded.weighted_sum, TorchVectors()
        self._signed = loaded.signed_sums
        self._signed.restype = ctypes.c_double
        for function in (self._products, self._weighted):
            function.restype = None

    def products(
        self, vectors: Sequence[Float[Tensor, "*shape"]], *, based: bool = False
    ) -> Float[Tensor, "k k"]:
        if not _known(vectors):
            return self._twin.products(vectors, based=based)
        own = len(vectors) - based
        found = torch.empty(own, own, dtype=torch.float64)
        held, addresses, kinds = _laid_out(vectors)
        self._products(addresses, kinds, ctypes.c_int64(len(held)), ctypes.c_int64(held[0].numel()),
                       ctypes.c_int64(based), ctypes.c_void_p(found.data_ptr()))  # fmt: skip
        return found

    def weighted(
        self, vectors: Sequence[Float[Tensor, "*shape"]], weights: Sequence[float], *, dtype: torch.dtype,
        based: bool = False,
    ) -> tuple[Float[Tensor, "*shape"], Moved]:  # fmt: skip
        if not _known(vectors) or dtype not in KINDS:
            return self._twin.weighted(vectors, weights, dtype=dtype, based=based)
        found = torch.empty(vectors[0].shape, dtype=dtype)
        held, addresses, kinds = _laid_out(vectors)
        told = (ctypes.c_double * 3)()
        self._weighted(addresses, kinds, ctypes.c_int64(len(held)), ctypes.c_int64(found.numel()),
                       (ctypes.c_float * len(weights))(*weights), ctypes.c_int64(based),
                       ctypes.c_void_p(found.data_ptr()), ctypes.c_int64(KINDS[dtype]), told)  # fmt: skip
        return found, Moved(*told)

    def signed_sums(
        self, vector: Float[Tensor, " n"], signs: Int8[Tensor, " period"], sums: Float[Tensor, " buckets"], *, at: int
    ) -> float:
        if not _known([vector]) or len(sums) != BUCKETS or len(signs) % BUCKETS:
            return self._twin.signed_sums(vector, signs, sums, at=at)
        held = vector.contiguous()
        found: float = self._signed(
            ctypes.c_void_p(held.data_ptr()), ctypes.c_int64(KINDS[held.dtype]), ctypes.c_int64(len(held)),
            ctypes.c_int64(at), ctypes.c_void_p(signs.data_ptr()), ctypes.c_int64(len(signs)),
            ctypes.c_void_p(sums.data_ptr()),
        )  # fmt: skip
        return found


def vectors_for(choice: str) -> Vectors:
    """C++ where it can be, or the twin: for the choices of LUTHIER_KERNELS that say so, and without a compiler.

    Raises MissingError when `choice` is native and it cannot.
    """
    if choice in ("torch", "blocks"):
        return TorchVectors()
    try:
        loaded, _ = library(_FOLDER, FLAGS, headers=[SOURCES / "numbers.h"])
    except MissingError:
        if choice == "native":
            raise
        return TorchVectors()
    return NativeVectors(loaded)


def gram(vectors: Sequence[Float[Tensor, "*shape"]]) -> Float[Tensor, "k k"]:
    """All inner products, summed in float64 over pieces that float32 sums well."""
    found = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    flat = [vector.reshape(-1) for vector in vectors]
    for begin in range(0, len(flat[0]), _PIECE):
        pieces = [vector[begin : begin + _PIECE] for vector in flat]
        for row, one in enumerate(pieces):
            for column in range(row + 1):
                found[row, column] += float(torch.dot(one, pieces[column]))
    return found + found.tril(-1).t()


def combined(
    vectors: Sequence[Float[Tensor, "*shape"]], weights: Sequence[float]
) -> Float[Tensor, "*shape"]:
    """The weighted sum. A vector of weight 0 is left out, and one of weight 1 alone comes back bit for bit."""
    parts = [(vector, weight) for vector, weight in zip(vectors, weights, strict=True) if weight]
    if not parts:
        return torch.zeros_like(vectors[0])
    found = parts[0][0].clone() if parts[0][1] == 1 else parts[0][0] * parts[0][1]
    for vector, weight in parts[1:]:
        found.add_(vector, alpha=weight)
    return found


def moved(
    found: Float[Tensor, "*shape"], vectors: Sequence[Float[Tensor, "*shape"]], *, based: bool
) -> Moved:
    """How far rows are from the base or the first of `vectors`; all are in float32."""
    reference = vectors[-1 if based else 0]
    apart, flat = (found - reference).reshape(-1), reference.reshape(-1)
    conflicts = 0.0
    if based and len(vectors) > 2:
        most = least = vectors[0] - reference
        for vector in vectors[1:-1]:
            change = vector - reference
            most, least = torch.maximum(most, change), torch.minimum(least, change)
        conflicts = float(((most > 0) & (least < 0)).sum())
    return Moved(float(torch.dot(apart, apart)), float(torch.dot(flat, flat)), conflicts)


def _known(vectors: Sequence[Tensor]) -> bool:
    return len(vectors) <= MOST and all(vector.dtype in KINDS and vector.device.type == "cpu" for vector in vectors)


def _laid_out(
    vectors: Sequence[Tensor],
) -> tuple[list[Tensor], ctypes.Array[ctypes.c_void_p], ctypes.Array[ctypes.c_int64]]:
    """The vectors without gaps, which must live as long as their addresses, and the types of their numbers."""
    held = [vector.contiguous() for vector in vectors]
    count = len(held)
    return (held, (ctypes.c_void_p * count)(*(vector.data_ptr() for vector in held)),
            (ctypes.c_int64 * count)(*(KINDS[vector.dtype] for vector in held)))  # fmt: skip
