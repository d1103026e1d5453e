"""linear against the mean that anybody would compute."""

from __future__ import annotations

import pytest
import torch

from luthier.core.errors import RecipeError
from tests.mergers_of import family, merge_whole, merger, part


def test_it_is_the_weighted_mean() -> None:
    """Breaks when the weights are not divided by their sum, or are although that was switched off."""
    _, models = family(3)
    whole = 1.0 * models[0] + 2.0 * models[1] - 0.5 * models[2]
    given = part(*models, weights=(1.0, 2.0, -0.5))
    torch.testing.assert_close(merge_whole(merger("linear"), given), whole / 2.5)
    torch.testing.assert_close(merge_whole(merger("linear", normalize=False), given), whole)


def test_weights_that_cancel_are_told() -> None:
    """Breaks when a mean is divided by zero."""
    with pytest.raises(RecipeError, match=r"\[1.0, -1.0\] have the sum 0"):
        merge_whole(merger("linear"), part(*family(2)[1], weights=(1.0, -1.0)))
