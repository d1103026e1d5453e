"""Inner products summed well, and weighted sums that obey weights of 0 and 1; the means: tests/mergers."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.kernels.vectors import combined, gram
from luthier.maths.spheres import cosine, karcher_weights, slerp_weights


def test_inner_products_are_those_of_float64() -> None:
    """Breaks when pieces are lost, or a triangle is added twice."""
    vectors = [np.random.default_rng(seed).standard_normal((3, 1 << 18), np.float32) for seed in range(3)]
    whole = np.stack([vector.astype(np.float64).ravel() for vector in vectors])
    np.testing.assert_allclose(gram(vectors), whole @ whole.T, rtol=1e-5, atol=1e-1)


def test_a_cosine_of_nothing_is_zero_and_none_is_beyond_one() -> None:
    """Breaks when rounding gives arccos something it has no answer for."""
    assert cosine(np.array([[0.0, 0.0], [0.0, 1.0]]), 0, 1) == 0
    assert cosine(np.array([[1.0, 1.0 + 1e-7], [1.0 + 1e-7, 1.0]]), 0, 1) == 1


def test_the_limit_of_the_straight_line_is_where_it_is_said_to_be() -> None:
    """Breaks when the limit moves: there slerp and lerp differ by less than two parts in a million."""
    for cos in (0.9994, 0.9996):
        one, other = slerp_weights(cos, 0.3)
        assert ((one, other) == (0.7, 0.3)) == (cos > 0.9995)
        assert one == pytest.approx(0.7, rel=2e-4)


def test_weights_of_zero_and_one_are_obeyed_and_the_vectors_are_left_alone() -> None:
    """Breaks when infinity times zero is NaN, or a model is changed in place."""
    one, other = (np.array(each, np.float32) for each in ([1.0, -0.0], [float("inf"), float("nan")]))
    found = combined([one, other], [1, 0])
    assert np.array_equal(found.view(np.int32), one.view(np.int32))
    found += 1
    assert one.tolist() == [1.0, 0.0] and combined([one, one], [0, 0]).tolist() == [0.0, 0.0]


def test_parallel_vectors_have_themselves_as_mean() -> None:
    """Breaks when an angle of zero divides."""
    vector = np.random.default_rng(0).standard_normal(5, np.float32)
    weights = karcher_weights(gram([vector] * 3), [1, 1, 2])
    assert sum(weights) == pytest.approx(1)
