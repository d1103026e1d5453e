"""Intruders against a brute-force count from the equation, and against planted ones."""

from __future__ import annotations

import math

import pytest
import torch

from luthier.maths.intruders import correction, likeness, norm_of_factors, shuffled, shuffled_whole
from luthier.maths.spectra import Summed, decomposed


def brute(base: torch.Tensor, tuned: torch.Tensor, k: int, epsilon: float) -> int:
    """The count as the paper defines it: both matrices decomposed, each of the first k beside all of the base's."""
    old = torch.linalg.svd(base, full_matrices=False)[0]
    new = torch.linalg.svd(tuned, full_matrices=False)[0]
    count = 0
    for place in range(k):
        best = max(abs(float(torch.dot(old[:, other], new[:, place]))) for other in range(old.shape[1]))
        count += best < epsilon
    return count


@pytest.mark.parametrize(("shape", "scale"), [((40, 40), 0.5), ((60, 30), 1.0), ((30, 60), 2.0), ((350, 340), 0.6)])
@pytest.mark.parametrize("epsilon", [0.3, 0.5, 0.8])
def test_the_count_is_that_of_the_definition(shape: tuple[int, int], scale: float, epsilon: float) -> None:
    """Breaks when cosines are signed, only the base's first vectors are looked at, or a side is taken for the other."""
    draws = torch.Generator().manual_seed(shape[0])
    weight = torch.randn(shape, generator=draws) / math.sqrt(shape[1])
    down, up = torch.randn(4, shape[1], generator=draws) / 6, scale * torch.randn(shape[0], 4, generator=draws)
    found = likeness(decomposed(weight), weight, Summed(weight, down, up), 10, gap=0.0)
    assert int(found.intruders("left", epsilon).sum()) == brute(weight, weight + up @ down, 10, epsilon)
    turned = brute(weight.t(), (weight + up @ down).t(), 10, epsilon)
    assert int(found.intruders("right", epsilon).sum()) == turned


def test_a_planted_direction_has_the_cosine_that_its_spread_says() -> None:
    """Breaks when a vector spread evenly over m old ones does not come to 1 / sqrt(m)."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    base = decomposed(weight)
    spread = base.left[:, 10:26].sum(1) / 4.0
    up = (50 * base.sizes[0] * spread)[:, None]
    down = base.right[:, 40][None]
    found = likeness(base, weight, Summed(weight, down, up), 10, gap=0.0)
    assert float(found.cosines["left"][0]) == pytest.approx(0.25, abs=0.01)
    assert found.intruders("left", 0.5).tolist() == [True] + [False] * 9
    assert found.intruders("left", 0.2).tolist() == [False] * 10


def test_noise_makes_none_and_equal_values_only_turn() -> None:
    """Breaks when tiny noise counts, or vectors that turned among equal singular values are not told apart."""
    weight = torch.randn(48, 48, generator=torch.Generator().manual_seed(2))
    base = decomposed(weight)
    noise = 1e-4 * torch.randn(48, 48, generator=torch.Generator().manual_seed(3))
    assert not likeness(base, weight + noise, None, 10, gap=0.01).intruders("left", 0.9).any()
    sizes = torch.cat([torch.full((16,), 3.0), torch.linspace(1, 0.1, 32)])
    equal = decomposed(base.left * sizes @ base.right.t())
    hadamard = torch.tensor([[1.0]])
    for _ in range(4):
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)]) / math.sqrt(2)
    mixed = torch.block_diag(hadamard, torch.eye(32))
    # The very same matrix up to one part in a thousand, whose singular vectors are all mixed up.
    lifted = sizes + 1e-3 * torch.cat([torch.linspace(1, 0, 16), torch.zeros(32)])
    tuned = (equal.left @ mixed) * lifted @ (equal.right @ mixed).t()
    found = likeness(equal, tuned, None, 10, gap=0.01)
    assert int(found.intruders("left", 0.5).sum()) == 10
    assert int(found.turned("left", 0.5).sum()) == 10


def test_a_random_change_has_the_singular_values_of_the_real_one() -> None:
    """Breaks when the control has another size, or is the change itself."""
    draws = torch.Generator().manual_seed(4)
    down, up = torch.randn(3, 20, generator=draws), torch.randn(30, 3, generator=draws)
    other_down, other_up = shuffled(down, up, draws)
    whole = shuffled_whole(up @ down, draws)
    sizes = torch.linalg.svdvals(up @ down)
    assert torch.allclose(torch.linalg.svdvals(other_up @ other_down), sizes, atol=1e-4)
    assert torch.allclose(torch.linalg.svdvals(whole), sizes, atol=1e-4)
    cosine = (whole * (up @ down)).sum() / sizes.square().sum()
    assert abs(float(cosine)) < 0.3


def test_a_correction_scales_one_direction_and_no_other() -> None:
    """Breaks when lambda is applied to the change instead of the direction, or to its neighbour."""
    tuned = torch.randn(12, 9, generator=torch.Generator().manual_seed(5))
    whole = decomposed(tuned)
    which = torch.tensor([False, True, False])
    down, up = correction(whole.first(3), which, 0.25)
    sizes = whole.sizes.clone()
    sizes[1] *= 0.25
    assert torch.allclose(tuned + up @ down, whole.left * sizes @ whole.right.t(), atol=1e-5)
    assert correction(whole.first(3), torch.zeros(3, dtype=torch.bool), 0.5)[0].shape == (0, 9)


def test_the_norm_of_factors_is_that_of_their_product_and_hides_no_nan() -> None:
    """Breaks when cross terms are forgotten, or NaN becomes a norm of zero."""
    draws = torch.Generator().manual_seed(6)
    down, up = torch.randn(3, 20, generator=draws), torch.randn(30, 3, generator=draws)
    assert norm_of_factors(down, up) == pytest.approx(float((up @ down).norm()), rel=1e-5)
    assert norm_of_factors(down, 0 * up) == 0.0
    assert math.isnan(norm_of_factors(down, up * math.nan))
