"""The noise scale of gradients whose mean and covariance are known."""

from __future__ import annotations

import pytest
import torch

from luthier.maths.gradient_noise import Noise, noise_of


def test_known_gradients_give_the_known_scale() -> None:
    """Breaks when a batch size is left out of an estimate, or the mean's own noise is counted as signal."""
    draws, rows, dimensions = torch.Generator().manual_seed(0), 4, 2000
    mean = torch.full((dimensions,), 0.1)
    # Of single rows the variance is 1 in each direction, so tr(Sigma) is 2000 and |G|^2 is 20.
    found = noise_of((mean + torch.randn(dimensions, generator=draws) / rows**0.5 for _ in range(200)), rows)
    assert found.micro_batches == 200
    assert found.signal == pytest.approx(20.0, rel=0.1)
    assert found.noise == pytest.approx(2000.0, rel=0.02)
    assert found.scale == pytest.approx(100.0, rel=0.1)


def test_the_estimates_are_those_of_two_batch_sizes() -> None:
    """Breaks when small and large change places: two gradients, worked out by hand."""
    found = noise_of([torch.tensor([3.0, 0.0]), torch.tensor([1.0, 2.0])], 2)
    assert (found.small, found.large) == (pytest.approx(7.0), pytest.approx(5.0))
    assert found.signal == pytest.approx((4 * 5 - 2 * 7) / 2)
    assert found.noise == pytest.approx((7 - 5) / (1 / 2 - 1 / 4))


def test_noise_alone_has_no_scale() -> None:
    """Breaks when a signal that is not there gives a number of rows."""
    assert Noise(2, 1, small=2.0, large=0.5).scale is None
    assert noise_of([torch.ones(3)], 4).micro_batches == 1
