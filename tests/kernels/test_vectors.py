"""Inner products and weighted sums in C++ against their twin and against float64, in every type and length."""

from __future__ import annotations

import math

import pytest
import torch

from luthier.core.errors import MissingError
from luthier.kernels import vectors as module
from luthier.kernels.vectors import MOST, NativeVectors, TorchVectors, Vectors, vectors_for

TYPES = (torch.float32, torch.bfloat16, torch.float16)
LENGTHS = (0, 1, 31, 1023, 1024, 1025, 5000)


@pytest.fixture(scope="module")
def native() -> Vectors:
    found = vectors_for("auto")
    if not isinstance(found, NativeVectors):
        pytest.skip("no compiler")
    return found


def drawn(count: int, length: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count * 10_000 + length)
    return [torch.randn(length, generator=generator).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_products_are_those_of_float64(native: Vectors, length: int, dtype: torch.dtype, based: bool) -> None:
    """Breaks when the end of a vector is left out or counted twice, or the base is not subtracted."""
    given = drawn(3, length, dtype)
    wide = [each.double() for each in given]
    wanted = torch.stack([each - wide[-1] for each in wide[:-1]] if based else wide)
    for each in (native, TorchVectors()):
        found = each.products(given, based=based)
        torch.testing.assert_close(found, wanted @ wanted.t(), rtol=1e-5, atol=1e-4)
        assert torch.equal(found, found.t()) and found.dtype == torch.float64


@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize("to", TYPES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_sums_are_the_twins(
    native: Vectors, length: int, dtype: torch.dtype, to: torch.dtype, based: bool
) -> None:
    """Breaks when a sum is rounded twice, or the measures are those of other vectors."""
    given, weights = drawn(3, length, dtype), (0.7, -0.4, 0.25)
    found, told = native.weighted(given, weights, dtype=to, based=based)
    wanted, expected = TorchVectors().weighted(given, weights, dtype=to, based=based)
    assert found.dtype == to and found.shape == wanted.shape
    step = torch.finfo(to).eps
    torch.testing.assert_close(found.float(), wanted.float(), rtol=step, atol=1e-6)
    assert told.moved == pytest.approx(expected.moved, rel=1e-4, abs=1e-6)
    assert told.whole == pytest.approx(expected.whole, rel=1e-4, abs=1e-6)
    assert told.conflicts == expected.conflicts and (not based or length < 9 or told.conflicts > 0)


def test_types_may_differ_and_rows_are_matrices(native: Vectors) -> None:
    """Breaks when each vector is read as the first one is."""
    given = [each.reshape(10, 100).to(dtype) for each, dtype in zip(drawn(3, 1000), TYPES, strict=True)]
    given[0] = given[0].t().contiguous().t()
    found, _ = native.weighted(given, (0.5, 0.25, 1.5), dtype=torch.float32)
    wanted, _ = TorchVectors().weighted(given, (0.5, 0.25, 1.5), dtype=torch.float32)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(native.products(given), TorchVectors().products(given), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", TYPES)
def test_weights_of_one_and_zero_are_obeyed_and_not_computed_with(native: Vectors, dtype: torch.dtype) -> None:
    """Breaks when -0.0 becomes 0.0, or a model of weight 0 spoils the result with what is not finite."""
    one, other = drawn(2, 1500, dtype)
    one[7], other[3], other[4] = -0.0, math.nan, math.inf
    for each in (native, TorchVectors()):
        found, _ = each.weighted([one, other], (1.0, 0.0), dtype=dtype)
        assert torch.equal(found.view(torch.int8), one.view(torch.int8))
        found, _ = each.weighted([one, other], (0.0, 0.0), dtype=dtype)
        assert not found.any()


@pytest.mark.parametrize("dtype", TYPES)
def test_what_is_not_finite_is_seen(native: Vectors, dtype: torch.dtype) -> None:
    """Breaks when a not-a-number comes out as a number, or the measures hide it."""
    for value in (math.nan, math.inf, -math.inf):
        one, other = drawn(2, 1500, dtype)
        one[1300] = value
        found, told = native.weighted([one, other], (0.5, 0.5), dtype=dtype)
        assert not bool(found[1300].isfinite()) and int((~found.isfinite()).sum()) == 1
        assert not math.isfinite(told.moved) or not math.isfinite(told.whole)


def test_halves_are_rounded_to_even(native: Vectors) -> None:
    """Breaks when bfloat16 is cut off, or ties go up."""
    bits = torch.arange(0, 1 << 16, dtype=torch.int32)
    given = [torch.cat([(bits << 16 | half) for half in (0, 1, 0x7FFF, 0x8000, 0x8001)]).view(torch.float32)]
    given = [torch.where(given[0].isfinite(), given[0], 1.0)]
    found, _ = native.weighted(given, (1.0,), dtype=torch.bfloat16)
    assert torch.equal(found.view(torch.int16), given[0].bfloat16().view(torch.int16))


@pytest.mark.parametrize("cuts", [(), (1,), (63, 64, 65), (1000, 1024), (8191, 8192, 8193), (5000, 12_345)])
@pytest.mark.parametrize("dtype", TYPES)
def test_signed_sums_do_not_depend_on_where_a_vector_is_cut(
    native: Vectors, dtype: torch.dtype, cuts: tuple[int, ...]
) -> None:
    """Breaks when a piece begins in another bucket, or behind the end of the signs."""
    [given], period = drawn(1, 20_000, dtype), 64 * 33
    signs = torch.randint(0, 2, (period,), generator=torch.manual_seed(0), dtype=torch.int8) * 2 - 1
    places = torch.arange(len(given))
    wanted = torch.zeros(64, dtype=torch.float64).index_add_(0, places % 64, given.double() * signs[places % period])
    for each in (native, TorchVectors()):
        sums, square = torch.zeros(64, dtype=torch.float64), 0.0
        for begin, end in zip((0, *cuts), (*cuts, len(given)), strict=True):
            square += each.signed_sums(given[begin:end], signs, sums, at=begin)
        torch.testing.assert_close(sums, wanted, rtol=1e-6, atol=1e-6)
        assert square == pytest.approx(float(given.double().square().sum()), rel=1e-6)


def test_more_vectors_or_other_types_are_the_twins_work(native: Vectors) -> None:
    """Breaks when C++ reads float64 as float, or writes behind its tiles."""
    for given in (drawn(MOST + 1, 300), drawn(2, 300, torch.float64)):
        weights = tuple(0.1 * number for number in range(len(given)))
        found, _ = native.weighted(given, weights, dtype=torch.float32)
        wanted = sum(weight * each.double() for weight, each in zip(weights, given, strict=True))
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
        assert native.products(given).shape == (len(given), len(given))
    found, _ = native.weighted(drawn(MOST, 300), (1.0,) * MOST, dtype=torch.float64)
    assert found.dtype == torch.float64


def test_without_a_compiler_the_twin_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a merge fails on a machine without one, or native is asked for and something else comes."""

    def none(*_: object, **__: object) -> None:
        raise MissingError("no compiler here")

    monkeypatch.setattr(module, "library", none)
    assert isinstance(vectors_for("auto"), TorchVectors)
    assert isinstance(vectors_for("torch"), TorchVectors)
    with pytest.raises(MissingError, match="no compiler here"):
        vectors_for("native")
