"""Sums of products of many rows: against float64, whatever is beside a row, and by the library elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from luthier.kernels import many
from luthier.kernels.many import NARROW, Summand, by_library, multiplies_many
from luthier.kernels.native_backend import NativeBackend
from luthier.kernels.products import Factor, Products
from luthier.kernels.torch_backend import TorchBackend

ROWS = (33, 97, 100, 129, 130, 397)
SHAPES = ((2, 1), (16, 15), (30, 16), (32, 17), (34, 48), (130, 64), (64, 65), (288, 200), (4098, 70), (9000, 16))
"""Inputs and outputs of a product: whole vectors and panels, less and more; W in one piece, and in several."""
HALF = torch.bfloat16
native = NativeBackend.build()


@pytest.fixture(autouse=True)
def chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is tested on every processor, also where it is not the fastest."""
    monkeypatch.setattr(many, "multiplies_many", lambda: True)


def drawn(*shape: int, seed: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(parts: Sequence[Summand], bias: Tensor | None = None) -> Tensor:
    found = sum(x.double() @ (weight if across else weight.t()).double() for x, weight, across in parts)
    assert isinstance(found, Tensor)
    return found if bias is None else found + bias.double()


def close(found: Tensor, wanted: Tensor, size: int) -> bool:
    """One rounding of the result, and float32 roundings of the sum."""
    unit = 2.0**-8
    spread = math.sqrt(size) * 2.0**-22 * max(1.0, float(wanted.abs().max()))
    return bool(((found.double() - wanted).abs() <= unit * wanted.abs() + spread).all())


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_a_product_of_any_shape_is_that_of_float64(rows: int, across: bool) -> None:
    """Breaks when the end of a row, a panel or a tile is left out, or zeros are where numbers should be."""
    for size, outs in SHAPES:
        x, bias = drawn(rows, size, seed=1), drawn(outs, seed=2)
        weight = drawn(*((size, outs) if across else (outs, size)), seed=3)
        part = Summand(x, weight, across)
        assert close(native.summed((part,)), exact((part,)), size), (size, outs)
        assert close(native.summed((part,), bias), exact((part,), bias), size), (size, outs, "bias")


def test_a_sum_of_several_products_goes_where_it_belongs() -> None:
    """Breaks when a product overwrites the one before it, views are read as if they were whole, or a result goes beyond
    its columns."""
    rows, outs = 101, 70
    wide = drawn(rows, 64, seed=4)
    deep = Summand(drawn(rows, 4200, seed=12), drawn(outs, 4200, seed=13))
    parts = (
        Summand(wide[:, 8:40], drawn(32, outs, seed=5), across=True),
        Summand(wide[:, 40:56], drawn(outs, 16, seed=6)),
        Summand(drawn(rows, 130, seed=7), drawn(200, 130, seed=8)[60 : 60 + outs]),
        Summand(drawn(rows, 6, seed=9), drawn(6, 90, seed=10)[:, 4 : 4 + outs], across=True),
    )
    assert close(native.summed(parts), exact(parts), 200)
    assert close(native.summed((*parts, deep)), exact((*parts, deep)), 5000)
    room = drawn(rows, 96, seed=11)
    before = room.clone()
    found = native.summed(parts, out=room[:, 10 : 10 + outs])
    assert found.data_ptr() == room[:, 10:].data_ptr() and close(found, exact(parts), 200)
    assert torch.equal(room[:, :10], before[:, :10]) and torch.equal(room[:, 80:], before[:, 80:])


def test_other_rows_change_no_bit() -> None:
    """Breaks when what a row becomes depends on how many are beside it: a text would depend on its batch."""
    x, weight = drawn(403, 64, seed=1), drawn(80, 64, seed=2)
    low, up = drawn(403, 8, seed=3), drawn(80, 8, seed=4)
    whole = native.summed((Summand(x, weight), Summand(low, up)))
    for first, last in ((0, 33), (5, 60), (100, 403)):
        some = native.summed((Summand(x[first:last], weight), Summand(low[first:last], up)))
        assert torch.equal(some, whole[first:last])


def test_what_is_not_finite_comes_out() -> None:
    """Breaks when a broken number is hidden, or spreads to rows that have none."""
    for bad in (math.nan, math.inf):
        x, weight = drawn(70, 32, seed=1), drawn(40, 32, seed=2)
        x[37, 5] = bad
        found = native.summed((Summand(x, weight),))
        assert not found[37].isfinite().any() and found.isfinite().all(1).sum() == 69


def test_what_the_kernel_cannot_read_is_multiplied_all_the_same() -> None:
    """Breaks when odd sizes, other precisions, columns far apart or few rows are refused or wrong."""
    for parts in (
        (Summand(drawn(50, 33, seed=1), drawn(20, 33, seed=2)),),
        (Summand(drawn(50, 40, seed=1)[:, ::2], drawn(20, 20, seed=2)),),
        (Summand(drawn(50, 33, seed=1)[:, :32], drawn(20, 32, seed=2)),),
        (Summand(drawn(5, 32, seed=1), drawn(20, 32, seed=2)),),
        (Summand(drawn(50, 32, seed=1).double(), drawn(20, 32, seed=2).double()),),
        (Summand(drawn(50, 32, seed=1).float(), drawn(20, 32, seed=2).float()),),
        (Summand(drawn(0, 32, seed=1), drawn(20, 32, seed=2)),),
        (Summand(drawn(50, 8, seed=1), drawn(8, 21, seed=2), across=True),
         Summand(drawn(50, 3, seed=3), drawn(21, 3, seed=4))),
    ):  # fmt: skip
        found = native.summed(parts)
        assert found.dtype == parts[0].x.dtype
        torch.testing.assert_close(found.double(), exact(parts), rtol=0.02, atol=0.05)


@pytest.mark.parametrize("rows", [33, 100, 513, 1100])
def test_products_over_rows_are_those_of_float64(rows: int) -> None:
    """Breaks when the last row of an odd number is lost, a stretch overwrites the one before, or a result is turned."""
    for high, wide in ((1, 1), (16, 70), (200, 6), (100, 130), (NARROW, 200), (NARROW + 1, 200)):
        left, right = drawn(rows, high + 4, seed=1)[:, 2:-2], drawn(rows, wide, seed=2)
        wanted = left.double().t() @ right.double()
        for asked in (torch.float32, HALF):
            found = native.crossed(left, right, asked)
            assert found.shape == wanted.shape and found.dtype == asked
            # The library rounds what it has summed to the precision of its factors.
            library = min(high, wide) > NARROW
            unit = 2.0**-8 if asked == HALF or library else 2.0**-22
            spread = rows**0.5 * 2.0**-21 * max(1.0, float(wanted.abs().max()))
            assert bool(((found.double() - wanted).abs() <= unit * wanted.abs() + spread).all()), (high, wide, asked)


def test_a_narrower_result_than_its_factors_is_made_by_the_library() -> None:
    """Breaks when floats are written where there is room for half of them."""
    left, right = drawn(60, 4, seed=1, dtype=torch.float32), drawn(60, 6, seed=2, dtype=torch.float32)
    found = native.crossed(left, right, torch.bfloat16)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, (left.t() @ right).bfloat16())


def test_no_memory_is_an_error_and_not_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a failed workspace leaves a result that nobody has written."""
    monkeypatch.setitem(native._functions, ("product_sums", HALF), lambda *_: 1)
    with pytest.raises(torch.OutOfMemoryError, match="product_sums"):
        native.summed((Summand(drawn(140, 8, seed=1), drawn(8, 8, seed=2)),))


def test_a_layer_with_its_term_is_as_in_plain_torch_forward_and_back() -> None:
    """Breaks when a term is added twice or to another layer, or a gradient is of another factor."""
    rows, size, outs, rank = 120, 48, (64, 32), 4
    x = drawn(rows, size, seed=1)
    tensors: list[Tensor | None] = []
    for index, out in enumerate(outs):
        seeds = range(10 * index + 2, 10 * index + 6)
        shapes = ((out, size), (out,), (rank, size), (out, rank))
        tensors += [drawn(*shape, seed=seed, dtype=torch.float32) for shape, seed in zip(shapes, seeds, strict=True)]
    given = [each.to(HALF) if index % 4 < 2 and each is not None else each for index, each in enumerate(tensors)]
    found = {}
    for backend in (native, TorchBackend()):
        products = Products(given, (Factor(0.5), Factor(2.0)), HALF, backend)
        outputs, low = products.forward(x)
        grads = [drawn(rows, out, seed=40 + out) for out in outs]
        found[backend.name] = (*outputs, low, *_flat(products.backward(x, low, grads, [True] * 8, input_needs=True)))
    for ours, plain in zip(*found.values(), strict=True):
        assert ours is not None and plain is not None and ours.dtype == plain.dtype
        torch.testing.assert_close(ours, plain, rtol=0.03, atol=0.03 * float(plain.abs().max()))


def _flat(found: tuple[Tensor | None, list[Tensor | None]]) -> list[Tensor | None]:
    return [found[0], *found[1]]


def test_the_library_adds_the_same_things_up() -> None:
    """Breaks when the way without the kernel forgets a product, the bias or where the result goes."""
    x, weight, low, up, bias = (drawn(*shape, seed=len(shape) + sum(shape), dtype=torch.float32)
                                for shape in ((9, 6), (5, 6), (9, 4), (4, 5), (5,)))  # fmt: skip
    parts, room = (Summand(x, weight), Summand(low, up, across=True)), torch.empty(9, 5)
    turned = (parts[1], parts[0])
    for some in (parts, turned, parts[:1], parts[1:]):
        for own in (None, bias):
            found = by_library(some, own, None, TorchBackend().product)
            torch.testing.assert_close(found.double(), exact(some, own), rtol=1e-5, atol=1e-5)
            assert by_library(some, own, room, TorchBackend().product) is room
            torch.testing.assert_close(room.double(), exact(some, own), rtol=1e-5, atol=1e-5)


def test_the_kernel_is_chosen_by_what_the_processor_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when it is taken where AMX is, or where there are no products of pairs."""
    for pairs, tiles, wanted in ((True, False, True), (True, True, False), (False, False, False)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda pairs=pairs: pairs)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda tiles=tiles: tiles)
        multiplies_many.cache_clear()
        assert multiplies_many() is wanted
    multiplies_many.cache_clear()
