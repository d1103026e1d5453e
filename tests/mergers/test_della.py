"""della: the chance of each change by its rank, that the mean is kept, and its edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from luthier.core.errors import RecipeError
from luthier.mergers.della import Della
from tests.mergers_of import family, merge_whole, merger, part


def test_chances_grow_evenly_with_the_rank_within_a_row() -> None:
    """Breaks when ranks are of the whole tensor, or the smallest change has the best chance."""
    change = torch.tensor([[0.1, -5.0, 2.0], [30.0, -10.0, 20.0]])
    chances = Della(density=0.5, epsilon=0.2).chances(change.numpy())
    np.testing.assert_allclose(chances, [[0.3, 0.7, 0.5], [0.7, 0.3, 0.5]], rtol=1e-6)
    assert float(Della(density=0.5).chances(np.zeros((2, 1), np.float32)).max()) == pytest.approx(0.4)


def test_what_stays_is_divided_by_its_own_chance_so_that_the_mean_is_kept() -> None:
    """Breaks when all are divided by density."""
    torch.manual_seed(0)
    model, base = torch.randn(2000, 20).abs().sort(dim=1)[0], torch.zeros(2000, 20)
    method = merger("della", density=0.4, epsilon=0.3, fuse="linear", normalize=False)
    merged = merge_whole(method, part(model, base=base))
    assert float((merged != 0).float().mean()) == pytest.approx(0.4, abs=0.01)
    torch.testing.assert_close(merged.mean(0), model.mean(0), rtol=0.15, atol=0.05)


def test_votes_and_sums_are_those_of_the_other_methods_where_nothing_is_dropped() -> None:
    """Breaks when a density of 1 still drops, or the vote is another than that of ties."""
    base, models = family(3)
    given = part(*models, base=base, weights=(1.0, 2.0, 0.5))
    ties = merge_whole(merger("ties", density=1.0), given)
    torch.testing.assert_close(merge_whole(merger("della", density=1.0), given), ties)
    added = merge_whole(merger("task_arithmetic", normalize=True), given)
    torch.testing.assert_close(merge_whole(merger("della", density=1.0, fuse="linear"), given), added)


def test_chances_outside_of_0_and_1_are_told() -> None:
    """Breaks when a chance of zero divides."""
    with pytest.raises(RecipeError, match=r"give chances from 0 to 0.2"):
        merger("della", density=0.1, epsilon=0.1)
