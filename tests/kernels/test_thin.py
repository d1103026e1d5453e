"""Thin terms: many of them on rows of their own, against a loop over rows in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from luthier.kernels.backend import Backend
from luthier.kernels.native_backend import NativeBackend
from luthier.kernels.thin import LONG, ThinFactors, ThinRows, ThinTerms, add_gathered
from luthier.kernels.thin_pass import ThinTerm
from luthier.kernels.torch_backend import TorchBackend

RANKS = {0: 3, 1: 16, 3: 1, 11: 40}
"""Numbers and ranks; 2 is nobody's, and 11 is beyond the first room of a table."""
RANGES = (
    (0, 1, ((0, 1.0),)),
    (1, 6, ((1, 0.5), (3, -2.0))),
    # Nobody's rows, and rows of a number that has no term here.
    (7, 9, ((2, 1.0),)),
    (9, 10, ()),
    (10, 10 + LONG, ((11, 1.0), (0, 0.25))),
    (10 + LONG, 13 + LONG, ((11, 1.5),)),
    (13 + LONG, 14 + LONG, ((0, 1.0), (1, 1.0), (3, 1.0), (11, 1.0))),
)
COUNT = 14 + LONG


@pytest.fixture(scope="module", params=[NativeBackend.build, TorchBackend])
def backend(request: pytest.FixtureRequest) -> Backend:
    built: Backend = request.param()
    return built


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def made(inputs: int, outputs: int, dtype: torch.dtype) -> tuple[ThinTerms, dict[int, tuple[Tensor, Tensor, float]]]:
    terms, raw = ThinTerms(), {}
    for number, rank in RANKS.items():
        down, up = drawn(rank, inputs, seed=number, dtype=dtype), drawn(outputs, rank, seed=50 + number, dtype=dtype)
        raw[number] = (down, up, 0.5 + number)
        terms.put(number, ThinFactors.of(*raw[number], dtype))
    return terms, raw


def by_row(x: Tensor, y: Tensor, raw: dict[int, tuple[Tensor, Tensor, float]]) -> Tensor:
    """The sums in float64, a row at a time."""
    found = y.double().clone()
    for start, stop, parts in RANGES:
        for row in range(start, stop):
            for number, weight in parts:
                if number in raw:
                    down, up, scale = raw[number]
                    found[row] += weight * scale * (up.double() @ (down.double() @ x[row].double()))
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(("inputs", "outputs"), [(5, 3), (64, 64), (100, 200), (33, 129)])
def test_each_row_gets_its_own_terms(
    backend: Backend, dtype: torch.dtype, tolerance: float, inputs: int, outputs: int
) -> None:
    """Breaks when a tile reads another range's terms, a last vector is cut off, or a weight or a scale is left out."""
    terms, raw = made(inputs, outputs, dtype)
    x, y = drawn(COUNT, inputs, seed=100, dtype=dtype), drawn(COUNT, outputs, seed=101, dtype=dtype)
    expected, found = by_row(x, y, raw), y.clone()
    ThinTerm(terms, ThinRows(RANGES), backend).add(x, found)
    torch.testing.assert_close(
        found.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
    )
    untouched = [6, 7, 8, 9]
    assert torch.equal(found[untouched], y[untouched])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_no_number_stays_with_its_rows(backend: Backend, dtype: torch.dtype) -> None:
    """Breaks when rows are multiplied by zero instead of left out."""
    terms, raw = made(64, 96, dtype)
    x, y = drawn(COUNT, 64, seed=100, dtype=dtype), drawn(COUNT, 96, seed=101, dtype=dtype)
    before, after = y.clone(), y.clone()
    ThinTerm(terms, ThinRows(RANGES), backend).add(x, before)
    terms.put(1, ThinFactors.of(raw[1][0] * torch.nan, raw[1][1] * torch.nan, 1.0, dtype))
    x[9] = torch.inf
    ThinTerm(terms, ThinRows(RANGES), backend).add(x, after)
    touched = [*range(1, 6), COUNT - 1]
    others = [row for row in range(COUNT) if row not in touched]
    assert torch.equal(after[others], before[others]) and bool(after[touched].isnan().all())


def test_a_term_that_left_adds_nothing(backend: Backend) -> None:
    """Breaks when factors are read whose memory is somebody else's by now."""
    terms, raw = made(64, 96, torch.float32)
    x, y = drawn(COUNT, 64, seed=100), drawn(COUNT, 96, seed=101)
    for number in (1, 11):
        terms.drop(number)
        del raw[number]
    expected = by_row(x, y, raw)
    ThinTerm(terms, ThinRows(RANGES), backend).add(x, y)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("ranks", [(700, 700), (1024,), (1025,), (1023, 3, 1), (2500, 5), (1, 4, 1024, 1024, 9)])
def test_more_ranks_than_a_tile_has_room_for(
    backend: Backend, ranks: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    """Breaks when the C++ writes behind its workspace, or a term that is cut there loses a rank."""
    terms, x, y = ThinTerms(), drawn(5, 16, seed=2, dtype=dtype), drawn(5, 70, seed=3, dtype=dtype)
    expected = y.double()
    for number, rank in enumerate(ranks):
        down, up = drawn(rank, 16, seed=number, dtype=dtype), drawn(70, rank, seed=9 + number, dtype=dtype)
        terms.put(number, ThinFactors.of(down, up, 0.5, dtype))
        expected = expected + 0.5 * (1 + number) * (x.double() @ down.double().t() @ up.double().t())
    parts = tuple((number, 1.0 + number) for number in range(len(ranks)))
    ThinTerm(terms, ThinRows(((0, 5, parts),)), backend).add(x, y)
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_a_row_is_the_same_whoever_shares_its_tile() -> None:
    """Breaks when a row's sum depends on how many rows of its range there are."""
    backend = NativeBackend.build()
    terms, _ = made(100, 200, torch.float32)
    many = ThinFactors.of(drawn(1500, 100, seed=7), drawn(200, 1500, seed=8), 1.0, torch.float32)
    terms.put(4, many)
    x, y = drawn(7, 100, seed=3), drawn(7, 200, seed=4)
    for parts in (((1, 1.0),), ((1, 1.0), (4, 0.5))):
        together, alone = y.clone(), y.clone()
        backend.thin(x, together, terms, ThinRows(((0, 7, parts),)))
        for row in range(7):
            backend.thin(x, alone, terms, ThinRows(((row, row + 1, parts),)))
        assert torch.equal(together, alone)


def test_nothing_to_do_is_nothing_done() -> None:
    """Breaks when a site without terms of these rows is an error."""
    terms, _ = made(16, 16, torch.float32)
    y = torch.zeros(2, 16)
    add_gathered(torch.ones(2, 16), y, terms, ((0, 2, ((2, 1.0),)),))
    assert not y.any()


def test_rows_that_are_not_there_are_refused(backend: Backend) -> None:
    """Breaks when ranges of another batch are written to, whoever's memory that is."""
    terms, _ = made(16, 16, torch.float32)
    with pytest.raises(ValueError, match=f"terms for {COUNT} rows, of which there are {COUNT - 1}"):
        ThinTerm(terms, ThinRows(RANGES), backend).add(torch.ones(COUNT - 1, 16), torch.zeros(COUNT - 1, 16))
