"""task_arithmetic against its equation."""

from __future__ import annotations

import pytest
import torch

from luthier.core.errors import RecipeError
from tests.mergers_of import family, merge_whole, merger, part


def test_changes_are_added_and_taken_away() -> None:
    """Breaks when the base is counted twice, or a scale of the sum is one of each weight's share."""
    base, models = family(3)
    weights = (0.5, 1.0, -0.25)
    moved = sum(weight * (model - base) for weight, model in zip(weights, models, strict=True))
    given = part(*models, base=base, weights=weights)
    torch.testing.assert_close(merge_whole(merger("task_arithmetic", scale=0.7), given), base + 0.7 * moved)
    torch.testing.assert_close(merge_whole(merger("task_arithmetic", normalize=True), given), base + moved / 1.25)


def test_all_of_one_change_is_the_model_and_none_is_the_base() -> None:
    """Breaks when base + (model - base) is rounded on its way."""
    base, (one,) = family(1)
    assert torch.equal(merge_whole(merger("task_arithmetic"), part(one, base=base)), one)
    assert torch.equal(merge_whole(merger("task_arithmetic"), part(one, base=base, weights=(0.0,))), base)
    with pytest.raises(RecipeError, match="have the sum 0"):
        merge_whole(merger("task_arithmetic", normalize=True), part(one, base=base, weights=(0.0,)))
