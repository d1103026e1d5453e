"""Leading singular vectors against whole decompositions, and ranks against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from luthier.maths.spectra import Summed, decomposed, effective_rank, leading, of_factors, stable_rank


def matrices(outputs: int, inputs: int, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(outputs)
    weight = torch.randn(outputs, inputs, generator=draws) / math.sqrt(inputs)
    down = torch.randn(rank, inputs, generator=draws) / math.sqrt(inputs)
    return weight, down, scale * torch.randn(outputs, rank, generator=draws)


@pytest.mark.parametrize(("shape", "scale"), [((400, 700), 0.4), ((640, 400), 0.05), ((400, 400), 0.0)])
def test_the_leading_part_of_a_sum_is_that_of_the_whole_matrix(shape: tuple[int, int], scale: float) -> None:
    """Breaks when the iteration stops early, misses a direction of the change, or loses the scale of a factor."""
    weight, down, up = matrices(*shape, 6, scale)
    whole = decomposed(weight + up @ down)
    found = leading(Summed(weight, down, up), 10, decomposed(weight).right[:, :14])
    assert torch.allclose(found.sizes, whole.sizes[:10], rtol=1e-5)
    for own, true in ((found.left, whole.left), (found.right, whole.right)):
        assert float(((own * true[:, :10]).sum(0).abs() - 1).abs().max()) < 1e-3


def test_it_needs_no_good_start() -> None:
    """Breaks when a start across the true vectors is never left."""
    weight, down, up = matrices(400, 500, 4, 0.5)
    wrong = decomposed(weight).right[:, -14:]
    found = leading(Summed(weight, down, up), 5, wrong)
    assert torch.allclose(found.sizes, torch.linalg.svdvals(weight + up @ down)[:5], rtol=1e-5)


def test_thin_factors_are_decomposed_without_their_product() -> None:
    """Breaks when a side is swapped or a triangular factor is used the wrong way round."""
    _, down, up = matrices(30, 50, 4, 1.0)
    found = of_factors(down, up)
    assert torch.allclose(found.left * found.sizes @ found.right.t(), up @ down, atol=1e-5)
    assert torch.allclose(found.sizes, torch.linalg.svdvals(up @ down)[:4], rtol=1e-4)


def test_ranks_have_their_closed_forms() -> None:
    """Breaks when equal values do not count whole, or zeros count at all."""
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3.0)
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(
        math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    )
    assert stable_rank(torch.tensor([2.0, 2.0, 1.0])) == pytest.approx(2.25)
    assert effective_rank(torch.zeros(3)) == stable_rank(torch.zeros(3)) == 0.0
