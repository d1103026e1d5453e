"""Inner products and weighted sums in C++ against their twin and against float64, in every type and length."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from luthier.core.errors import MissingError
from luthier.kernels import vectors as module
from luthier.kernels.floats import BFLOAT16, FLOAT16, FLOAT32, DType, narrowed, step, widened
from luthier.kernels.vectors import MOST, Moved, NativeVectors, PlainVectors, Vectors, vectors_for

TYPES = (FLOAT32, BFLOAT16, FLOAT16)
LENGTHS = (0, 1, 31, 1023, 1024, 1025, 5000)


def every_upper_half() -> np.ndarray:
    """Numbers with each upper half of a float32, and what decides how the lower one is rounded."""
    bits = np.arange(0, 1 << 16, dtype=np.uint32) << 16
    return np.concatenate([bits | half for half in (0, 1, 0x7FFF, 0x8000, 0x8001)]).astype(np.uint32).view(np.float32)


def weighted(
    vectors: Vectors, given: list[np.ndarray], weights: tuple[float, ...], *, dtype: DType, based: bool = False
) -> tuple[np.ndarray, Moved]:
    """The sum in memory of its own, and what is told of it."""
    found = np.empty(given[0].shape, dtype)
    return found, vectors.weighted(given, weights, into=found, based=based)


@pytest.fixture(scope="module")
def native() -> Vectors:
    found = vectors_for("auto")
    if not isinstance(found, NativeVectors):
        pytest.skip("no compiler")
    return found


def drawn(count: int, length: int, dtype: DType = FLOAT32) -> list[np.ndarray]:
    generator = np.random.default_rng(count * 10_000 + length)
    return [narrowed(generator.standard_normal(length, np.float32), dtype) for _ in range(count)]


def wide(given: list[np.ndarray]) -> list[np.ndarray]:
    return [widened(each).astype(np.float64) for each in given]


@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_products_are_those_of_float64(native: Vectors, length: int, dtype: DType, based: bool) -> None:
    """Breaks when the end of a vector is left out or counted twice, or the base is not subtracted."""
    given = drawn(3, length, dtype)
    plain = wide(given)
    wanted = np.stack([each - plain[-1] for each in plain[:-1]] if based else plain)
    for each in (native, PlainVectors()):
        found = each.products(given, based=based)
        np.testing.assert_allclose(found, wanted @ wanted.T, rtol=1e-5, atol=1e-4)
        assert np.array_equal(found, found.T) and found.dtype == np.float64


@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize("to", TYPES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_sums_are_the_twins(
    native: Vectors, length: int, dtype: DType, to: DType, based: bool
) -> None:
    """Breaks when a sum is rounded twice, or the measures are those of other vectors."""
    given, weights = drawn(3, length, dtype), (0.7, -0.4, 0.25)
    found, told = weighted(native, given, weights, dtype=to, based=based)
    wanted, expected = weighted(PlainVectors(), given, weights, dtype=to, based=based)
    assert found.dtype == to and found.shape == wanted.shape
    np.testing.assert_allclose(widened(found), widened(wanted), rtol=step(to), atol=1e-6)
    assert told.moved == pytest.approx(expected.moved, rel=1e-4, abs=1e-6)
    assert told.whole == pytest.approx(expected.whole, rel=1e-4, abs=1e-6)
    assert told.conflicts == expected.conflicts and (not based or length < 9 or told.conflicts > 0)


def test_types_may_differ_and_rows_are_matrices(native: Vectors) -> None:
    """Breaks when each vector is read as the first one is."""
    given = [narrowed(each.reshape(10, 100), dtype) for each, dtype in zip(drawn(3, 1000), TYPES, strict=True)]
    given[0] = given[0].T.copy().T
    found, _ = weighted(native, given, (0.5, 0.25, 1.5), dtype=FLOAT32)
    wanted, _ = weighted(PlainVectors(), given, (0.5, 0.25, 1.5), dtype=FLOAT32)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(native.products(given), PlainVectors().products(given), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", TYPES)
def test_weights_of_one_and_zero_are_obeyed_and_not_computed_with(native: Vectors, dtype: DType) -> None:
    """Breaks when -0.0 becomes 0.0, or a model of weight 0 spoils the result with what is not finite."""
    one, other = drawn(2, 1500, dtype)
    one[7], other[3], other[4] = -0.0, math.nan, math.inf
    for each in (native, PlainVectors()):
        found, _ = weighted(each, [one, other], (1.0, 0.0), dtype=dtype)
        assert np.array_equal(found.view(np.int8), one.view(np.int8))
        found, _ = weighted(each, [one, other], (0.0, 0.0), dtype=dtype)
        assert not widened(found).any()


@pytest.mark.parametrize("dtype", TYPES)
def test_what_is_not_finite_is_seen(native: Vectors, dtype: DType) -> None:
    """Breaks when a not-a-number comes out as a number, or the measures hide it."""
    for value in (math.nan, math.inf, -math.inf):
        one, other = drawn(2, 1500, dtype)
        one[1300] = value
        found, told = weighted(native, [one, other], (0.5, 0.5), dtype=dtype)
        finite = np.isfinite(widened(found))
        assert not finite[1300] and int((~finite).sum()) == 1
        assert not math.isfinite(told.moved) or not math.isfinite(told.whole)


def test_halves_are_rounded_to_even(native: Vectors) -> None:
    """Breaks when bfloat16 is cut off, or ties go up."""
    given = every_upper_half()
    given = np.where(np.isfinite(given), given, np.float32(1))
    found, _ = weighted(native, [given], (1.0,), dtype=BFLOAT16)
    assert np.array_equal(found.view(np.int16), torch.from_numpy(given).bfloat16().view(torch.int16).numpy())


@pytest.mark.parametrize("cuts", [(), (1,), (63, 64, 65), (1000, 1024), (8191, 8192, 8193), (5000, 12_345)])
@pytest.mark.parametrize("dtype", TYPES)
def test_signed_sums_do_not_depend_on_where_a_vector_is_cut(
    native: Vectors, dtype: DType, cuts: tuple[int, ...]
) -> None:
    """Breaks when a piece begins in another bucket, or behind the end of the signs."""
    [given], period = drawn(1, 20_000, dtype), 64 * 33
    signs = np.random.default_rng(0).integers(0, 2, period, np.int8) * 2 - 1
    places, [plain] = np.arange(len(given)), wide([given])
    wanted = np.bincount(places % 64, plain * signs[places % period])
    for each in (native, PlainVectors()):
        sums, square = np.zeros(64), 0.0
        for begin, end in zip((0, *cuts), (*cuts, len(given)), strict=True):
            square += each.signed_sums(given[begin:end], signs, sums, at=begin)
        np.testing.assert_allclose(sums, wanted, rtol=1e-6, atol=1e-6)
        assert square == pytest.approx(float(np.square(plain).sum()), rel=1e-6)


def test_more_vectors_or_other_types_are_the_twins_work(native: Vectors) -> None:
    """Breaks when C++ reads float64 as float, or writes behind its tiles."""
    for given in (drawn(MOST + 1, 300), drawn(2, 300, np.dtype(np.float64))):
        weights = tuple(0.1 * number for number in range(len(given)))
        found, _ = weighted(native, given, weights, dtype=FLOAT32)
        wanted = sum(weight * each for weight, each in zip(weights, wide(given), strict=True))
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
        assert native.products(given).shape == (len(given), len(given))
    found, _ = weighted(native, drawn(MOST, 300), (1.0,) * MOST, dtype=np.dtype(np.float64))
    assert found.dtype == np.float64


def test_without_a_compiler_the_twin_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a merge fails on a machine without one, or native is asked for and something else comes."""

    def none(*_: object, **__: object) -> None:
        raise MissingError("no compiler here")

    monkeypatch.setattr(module, "library", none)
    assert isinstance(vectors_for("auto"), PlainVectors)
    assert isinstance(vectors_for("torch"), PlainVectors)
    with pytest.raises(MissingError, match="no compiler here"):
        vectors_for("native")
