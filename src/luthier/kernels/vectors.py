"""Inner products, weighted and signed sums of long vectors, in the types they lie in: one pass over memory in C++.

Idea: what merging does to most tensors is two passes over numbers in bfloat16: how long vectors are and what angle they
have, then so much of each. In numpy either is a dozen passes over float32 copies. Here tiles are widened in the first
cache, everything is done to them there, and the result is rounded once. See vectors/vectors.cpp for how.
Equation: P_ij = <u_i, u_j>; s = sum_i w_i u_i; told |s - r|^2, |r|^2, r the base or the first vector;
    b_j = sum_{i: i mod 64 = j} sign_{i mod period} u_i.
Cost: one read of each vector, one write of the result. Vectors are arrays: no torch.
Use when: float32, bfloat16 or float16 with a compiler, up to 16 vectors. Not when: anything else; the twin in plain
    numpy does the same, slower. The compiler is asked once for a machine; the library is a small one of its own.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final, final

import numpy as np
from jaxtyping import Float, Int8, Shaped

from luthier.core.errors import MissingError
from luthier.kernels.floats import BFLOAT16, FLOAT16, FLOAT32, narrowed, widened
from luthier.kernels.native_build import FLAGS, SOURCES, library

KINDS: Final = {FLOAT32: 0, BFLOAT16: 1, FLOAT16: 2}
BUCKETS: Final = 64
"""Sums that C++ makes of signed numbers."""
MOST: Final = 16
"""Vectors that C++ takes at once."""
_PIECE: Final = 1 << 18
"""Numbers that float32 sums well."""
_FOLDER: Final = Path(__file__).parent / "vectors"
_FLAGS: Final = tuple(flag for flag in FLAGS if flag != "-fopenmp")
"""Whoever asks shares the work out; and what needs no threads need not bring a library for them before torch does."""


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
        self, vectors: Sequence[Float[np.ndarray, "*shape"]], *, based: bool = False
    ) -> Float[np.ndarray, "k k"]:
        """All inner products in float64; with `based` those of what the others have changed of it."""

    @abstractmethod
    def weighted(
        self, vectors: Sequence[Float[np.ndarray, "*shape"]], weights: Sequence[float], *,
        into: Float[np.ndarray, "*shape"], based: bool = False,
    ) -> Moved:  # fmt: skip
        """Put the weighted sum, computed in float32 and rounded once, into an array; how far it is from the base or the
        first vector.

        A vector of weight 0 is left out, and one of weight 1 alone comes back bit for bit.
        """

    @abstractmethod
    def signed_sums(
        self, vector: Shaped[np.ndarray, " n"], signs: Int8[np.ndarray, " period"],
        sums: Float[np.ndarray, " buckets"], *, at: int,
    ) -> float:  # fmt: skip
        """Add numbers, with the signs of their places, to the buckets of their places; the sum of their squares.

        The first has the place `at`. Signs begin again after the last, buckets too; they divide the number of signs.
        `sums` are in float64.
        """


@final
class PlainVectors(Vectors):
    """In plain numpy: every type."""

    def products(
        self, vectors: Sequence[Float[np.ndarray, "*shape"]], *, based: bool = False
    ) -> Float[np.ndarray, "k k"]:
        wide = [widened(vector) for vector in vectors]
        with np.errstate(all="ignore"):
            return gram([vector - wide[-1] for vector in wide[:-1]] if based else wide)

    def weighted(
        self, vectors: Sequence[Float[np.ndarray, "*shape"]], weights: Sequence[float], *,
        into: Float[np.ndarray, "*shape"], based: bool = False,
    ) -> Moved:  # fmt: skip
        wide = [widened(vector) for vector in vectors]
        with np.errstate(all="ignore"):
            found = combined(wide, weights)
            into[...] = narrowed(found, into.dtype)
            return moved(found, wide, based=based)

    def signed_sums(
        self, vector: Shaped[np.ndarray, " n"], signs: Int8[np.ndarray, " period"],
        sums: Float[np.ndarray, " buckets"], *, at: int,
    ) -> float:  # fmt: skip
        square, buckets = 0.0, len(sums)
        with np.errstate(all="ignore"):
            while len(vector):
                at %= len(signs)
                plain, vector = widened(vector[: len(signs) - at]), vector[len(signs) - at :]
                square += float(np.square(plain, dtype=np.float64).sum())
                front = at % buckets
                behind = -(front + len(plain)) % buckets
                signed = np.pad(plain * signs[at : at + len(plain)], (front, behind))
                sums += signed.reshape(-1, buckets).sum(0, dtype=np.float64)
                at += len(plain)
        return square


@final
class NativeVectors(Vectors):
    """In C++. What it has no types for, its twin does."""

    in_place: ClassVar[bool] = True

    def __init__(self, loaded: ctypes.CDLL) -> None:
        self._products, self._weighted, self._twin = loaded.vector_products, loaded.weighted_sum, PlainVectors()
        self._signed = loaded.signed_sums
        self._signed.restype = ctypes.c_double
        for function in (self._products, self._weighted):
            function.restype = None

    def products(
        self, vectors: Sequence[Float[np.ndarray, "*shape"]], *, based: bool = False
    ) -> Float[np.ndarray, "k k"]:
        if not _known(vectors):
            return self._twin.products(vectors, based=based)
        own = len(vectors) - based
        found = np.empty((own, own))
        held, addresses, kinds = _laid_out(vectors)
        self._products(addresses, kinds, ctypes.c_int64(len(held)), ctypes.c_int64(held[0].size),
                       ctypes.c_int64(based), _address(found))  # fmt: skip
        return found

    def weighted(
        self, vectors: Sequence[Float[np.ndarray, "*shape"]], weights: Sequence[float], *,
        into: Float[np.ndarray, "*shape"], based: bool = False,
    ) -> Moved:  # fmt: skip
        if not _known(vectors) or into.dtype not in KINDS or not into.flags.c_contiguous:
            return self._twin.weighted(vectors, weights, into=into, based=based)
        held, addresses, kinds = _laid_out(vectors)
        told = (ctypes.c_double * 3)()
        self._weighted(addresses, kinds, ctypes.c_int64(len(held)), ctypes.c_int64(into.size),
                       (ctypes.c_float * len(weights))(*weights), ctypes.c_int64(based),
                       _address(into), ctypes.c_int64(KINDS[into.dtype]), told)  # fmt: skip
        return Moved(*told)

    def signed_sums(
        self, vector: Shaped[np.ndarray, " n"], signs: Int8[np.ndarray, " period"],
        sums: Float[np.ndarray, " buckets"], *, at: int,
    ) -> float:  # fmt: skip
        if not _known([vector]) or len(sums) != BUCKETS or len(signs) % BUCKETS:
            return self._twin.signed_sums(vector, signs, sums, at=at)
        held = np.ascontiguousarray(vector)
        found: float = self._signed(
            _address(held), ctypes.c_int64(KINDS[held.dtype]), ctypes.c_int64(len(held)), ctypes.c_int64(at),
            _address(signs), ctypes.c_int64(len(signs)), _address(sums),
        )  # fmt: skip
        return found


def vectors_for(choice: str) -> Vectors:
    """C++ where it can be, or the twin: for the choices of LUTHIER_KERNELS that say so, and without a compiler.

    Raises MissingError when `choice` is native and it cannot.
    """
    if choice in ("torch", "blocks"):
        return PlainVectors()
    try:
        loaded, _ = library(_FOLDER, _FLAGS, headers=[SOURCES / "numbers.h"])
    except MissingError:
        if choice == "native":
            raise
        return PlainVectors()
    return NativeVectors(loaded)


def gram(vectors: Sequence[Float[np.ndarray, "*shape"]]) -> Float[np.ndarray, "k k"]:
    """All inner products, summed in float64 over pieces that float32 sums well."""
    found = np.zeros((len(vectors), len(vectors)))
    flat = [vector.reshape(-1) for vector in vectors]
    for begin in range(0, len(flat[0]), _PIECE):
        pieces = [vector[begin : begin + _PIECE] for vector in flat]
        for row, one in enumerate(pieces):
            for column in range(row + 1):
                found[row, column] += float(np.dot(one, pieces[column]))
    return found + np.tril(found, -1).T


def combined(
    vectors: Sequence[Float[np.ndarray, "*shape"]], weights: Sequence[float], *, mean: bool = False
) -> Float[np.ndarray, "*shape"]:
    """The weighted sum, or with `mean` that by the sum of the weights where there is one.

    A vector of weight 0 is left out, and one of weight 1 alone comes back bit for bit.
    """
    parts = [(vector, weight) for vector, weight in zip(vectors, weights, strict=True) if weight]
    if not parts:
        return np.zeros_like(vectors[0])
    found = parts[0][0].copy() if parts[0][1] == 1 else parts[0][0] * parts[0][1]
    room = np.empty_like(found)
    for vector, weight in parts[1:]:
        found += np.multiply(vector, weight, out=room)
    if mean and (whole := sum(weights)):
        found /= whole
    return found


def added(
    base: Float[np.ndarray, "*shape"], change: Float[np.ndarray, "*shape"], scale: float
) -> Float[np.ndarray, "*shape"]:
    """The base and so much of a change, in whose place the sum is put."""
    if scale != 1:
        change *= scale
    change += base
    return change


def moved(
    found: Float[np.ndarray, "*shape"], vectors: Sequence[Float[np.ndarray, "*shape"]], *, based: bool
) -> Moved:
    """How far rows are from the base or the first of `vectors`; all are in float32."""
    reference = vectors[-1 if based else 0]
    apart, flat = (found - reference).reshape(-1), reference.reshape(-1)
    conflicts = 0.0
    if based and len(vectors) > 2:
        more, less = np.zeros(found.shape, bool), np.zeros(found.shape, bool)
        for vector in vectors[:-1]:
            more |= vector > reference
            less |= vector < reference
        conflicts = float(np.count_nonzero(more & less))
    return Moved(float(np.dot(apart, apart)), float(np.dot(flat, flat)), conflicts)


def _known(vectors: Sequence[np.ndarray]) -> bool:
    return len(vectors) <= MOST and all(vector.dtype in KINDS for vector in vectors)


def _laid_out(
    vectors: Sequence[np.ndarray],
) -> tuple[list[np.ndarray], ctypes.Array[ctypes.c_void_p], ctypes.Array[ctypes.c_int64]]:
    """The vectors without gaps, which must live as long as their addresses, and the types of their numbers."""
    held = [np.ascontiguousarray(vector) for vector in vectors]
    count = len(held)
    return (held, (ctypes.c_void_p * count)(*(vector.ctypes.data for vector in held)),
            (ctypes.c_int64 * count)(*(KINDS[vector.dtype] for vector in held)))  # fmt: skip


def _address(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
