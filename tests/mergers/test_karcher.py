"""karcher: slerp where there are two, symmetric where there are more, and the smallest sum of squared angles."""

from __future__ import annotations

import math

import pytest
import torch

from luthier.core.errors import RecipeError
from tests.mergers_of import merge_whole, merger, part


def unit(*shape: int, seed: int) -> torch.Tensor:
    vector = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return vector / vector.norm()


@pytest.mark.parametrize("t", [0.2, 0.5])
def test_of_two_it_is_slerp(t: float) -> None:
    """Breaks when the iteration ends elsewhere than on the great circle, or too early."""
    one, other = unit(4, 5, seed=0), unit(4, 5, seed=1)
    mean = merge_whole(merger("karcher"), part(one, other, weights=(1 - t, t)))
    torch.testing.assert_close(mean, merge_whole(merger("slerp", t=t), part(one, other)), rtol=1e-5, atol=1e-6)


def test_the_mean_of_three_axes_is_their_sum_and_lengths_are_averaged() -> None:
    """Breaks when the length is that of the chord's middle."""
    axes = torch.eye(3) * torch.tensor([1.0, 2.0, 3.0])[:, None]
    mean = merge_whole(merger("karcher"), part(*axes))
    torch.testing.assert_close(mean[0], torch.full((3,), 2 / math.sqrt(3)))


def test_no_point_nearby_has_a_smaller_sum_of_squared_angles() -> None:
    """Breaks when weights are of chords rather than angles: the normalised mean is no Karcher mean."""
    vectors = [unit(12, seed=seed) for seed in range(4)]
    weights = (1.0, 2.0, 0.5, 1.0)
    mean = merge_whole(merger("karcher"), part(*vectors, weights=weights))[0].double()

    def spread(point: torch.Tensor) -> float:
        point = point / point.norm()
        angles = [torch.arccos((point @ vector.double()).clamp(-1, 1)) for vector in vectors]
        return float(sum(weight * angle.square() for weight, angle in zip(weights, angles, strict=True)))

    nudges = torch.randn(50, 12, generator=torch.Generator().manual_seed(9)).double() * 0.02
    assert all(spread(mean) < spread(mean + nudge) for nudge in nudges)


def test_zeros_have_no_direction_and_weights_have_a_sign() -> None:
    """Breaks when a tensor of zeros gives NaN, or negative weights are taken for shares."""
    one = unit(2, 3, seed=0)
    torch.testing.assert_close(merge_whole(merger("karcher"), part(one, torch.zeros(2, 3))), one / 2)
    assert not merge_whole(merger("karcher"), part(torch.zeros(2, 3), torch.zeros(2, 3))).any()
    with pytest.raises(RecipeError, match=r"weights are \[1.0, -1.0\]"):
        merge_whole(merger("karcher"), part(one, one, weights=(1.0, -1.0)))
