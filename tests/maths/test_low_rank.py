"""Starts of low-rank factors: what their products are, by brute force."""

from __future__ import annotations

import pytest
import torch

from luthier.maths import low_rank


def test_zero_starts_have_the_spread_they_declare() -> None:
    """Breaks when a bound or a deviation is that of another start, or B is not zero."""
    torch.manual_seed(0)
    down, up = low_rank.kaiming(64, 400, 30)
    assert 0.99 / 20 < float(down.abs().max()) <= 1 / 20 and not up.any() and up.shape == (30, 64)
    down, up = low_rank.gaussian(64, 400, 30)
    assert float(down.std()) == pytest.approx(1 / 64, rel=0.02) and not up.any()


def test_orthogonal_factors_see_nothing_of_each_other() -> None:
    """Breaks when both are turned by the same rows, or one of them is zero."""
    torch.manual_seed(0)
    down, up = low_rank.orthogonal(6, 40, 30)
    assert (down.shape, up.shape) == ((6, 40), (30, 6))
    assert float((up @ down).abs().max()) < 1e-7 and min(float(down.abs().max()), float(up.abs().max())) > 0.05


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_the_principal_part_is_the_best_approximation_of_its_rank(shape: tuple[int, int]) -> None:
    """Breaks when a singular value is missed or weighted twice, the scale is lost, or the halves are uneven."""
    torch.manual_seed(0)
    weight, rank, scale = torch.randn(shape), 5, 1.7
    down, up = low_rank.principal(weight, rank, scale)
    sizes = torch.linalg.svdvals(weight)
    rest = torch.linalg.svdvals(weight - scale * up @ down)
    torch.testing.assert_close(rest[: len(sizes) - rank], sizes[rank:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(down @ down.t(), up.t() @ up, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(down @ down.t(), (sizes[:rank] / scale).diag(), rtol=1e-4, atol=1e-5)


def test_the_first_part_of_qr_is_that_of_the_matrix() -> None:
    """Breaks when columns and rows are not of the same decomposition, or too many are taken."""
    torch.manual_seed(0)
    weight = torch.randn(24, 40)
    down, up = low_rank.triangular(weight, 24)
    torch.testing.assert_close(up @ down, weight, rtol=1e-4, atol=1e-5)
    down, up = low_rank.triangular(weight, 3)
    torch.testing.assert_close(up.t() @ up, torch.eye(3), rtol=1e-4, atol=1e-5)
    # The first columns of W are made of the first columns of Q alone.
    torch.testing.assert_close((up @ down)[:, :3], weight[:, :3], rtol=1e-4, atol=1e-5)
