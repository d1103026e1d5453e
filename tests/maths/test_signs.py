"""The vote; number by number it is tested with ties (tests/mergers/test_ties.py)."""

from __future__ import annotations

import numpy as np

from luthier.maths.signs import agreed


def test_a_mean_is_of_those_that_agree_and_a_sum_is_not_divided() -> None:
    """Breaks when those without a vote count in the mean."""
    changes = [np.array([2.0, -1.0, 0.0]), np.array([4.0, 3.0, 0.0]), np.array([0.0, -4.0, 0.0])]
    assert agreed(changes, [1, 1, 1], mean=True).tolist() == [3.0, -2.5, 0.0]
    assert agreed(changes, [1, 1, 1], mean=False).tolist() == [6.0, -5.0, 0.0]


def test_a_negative_weight_votes_the_other_way() -> None:
    """Breaks when the sign of a weight is lost in the division."""
    assert agreed([np.array([2.0])], [-1.0], mean=True).tolist() == [2.0]
