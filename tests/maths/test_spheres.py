"""Inner products summed well, and weighted sums that obey weights of 0 and 1; the means: tests/mergers."""

from __future__ import annotations

import pytest
import torch

from luthier.kernels.vectors import combined, gram
from luthier.maths.spheres import cosine, karcher_weights, slerp_weights


def test_inner_products_are_those_of_float64() -> None:
    """Breaks when pieces are lost, or a triangle is added twice."""
    vectors = [torch.randn(3, 1 << 18, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    whole = torch.stack([vector.double().flatten() for vector in vectors])
    torch.testing.assert_close(gram(vectors), whole @ whole.t(), rtol=1e-5, atol=1e-1)


def test_a_cosine_of_nothing_is_zero_and_none_is_beyond_one() -> None:
    """Breaks when rounding gives arccos something it has no answer for."""
    assert cosine(torch.tensor([[0.0, 0.0], [0.0, 1.0]]), 0, 1) == 0
    assert cosine(torch.tensor([[1.0, 1.0 + 1e-7], [1.0 + 1e-7, 1.0]]), 0, 1) == 1


def test_the_limit_of_the_straight_line_is_where_it_is_said_to_be() -> None:
    """Breaks when the limit moves: there slerp and lerp differ by less than two parts in a million."""
    for cos in (0.9994, 0.9996):
        one, other = slerp_weights(cos, 0.3)
        assert ((one, other) == (0.7, 0.3)) == (cos > 0.9995)
        assert one == pytest.approx(0.7, rel=2e-4)


def test_weights_of_zero_and_one_are_obeyed_and_the_vectors_are_left_alone() -> None:
    """Breaks when infinity times zero is NaN, or a model is changed in place."""
    one, other = torch.tensor([1.0, -0.0]), torch.tensor([float("inf"), float("nan")])
    found = combined([one, other], [1, 0])
    assert torch.equal(found.view(torch.int32), one.view(torch.int32))
    found.add_(1)
    assert one.tolist() == [1.0, 0.0] and combined([one, one], [0, 0]).tolist() == [0.0, 0.0]


def test_parallel_vectors_have_themselves_as_mean() -> None:
    """Breaks when an angle of zero divides."""
    vector = torch.randn(5).double()
    weights = karcher_weights(gram([vector.float()] * 3), [1, 1, 2])
    assert sum(weights) == pytest.approx(1)
