"""SFT: answers carry loss, prompts do not, and the loss is a sum with its weight."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.core.errors import DataError
from luthier.data.forest import Forest
from luthier.objectives.sft import SFT
from tests import forests

IDS = np.array([5, 6, 7, 8, 9], dtype=np.int32)
WEIGHTS = np.array([0, 0, 1, 0.5, 2], dtype=np.float32)


def test_a_row_becomes_one_tree_with_its_own_weights() -> None:
    """Breaks when the objective puts weights of its own on tokens, or loses the row's number."""
    (tree,) = SFT().trees(forests.view(7, IDS, weights=WEIGHTS))
    assert tree.row == 7 and len(tree.segments) == 1
    assert tree.segments[0].tokens.tolist() == IDS.tolist()
    assert tree.segments[0].weights.tolist() == WEIGHTS.tolist()


def test_a_row_without_a_trained_token_is_refused() -> None:
    """Breaks when a row that teaches nothing is trained on as if it did."""
    with pytest.raises(DataError, match="row 3 has no trained token"):
        SFT().trees(forests.view(3, IDS, weights=np.zeros(5, dtype=np.float32)))


def test_the_loss_is_the_weighted_sum_of_the_zoos_own_and_its_weight() -> None:
    """Breaks when the loss is a mean, or per-token weights are taken for flags."""
    model = forests.language_model("llama")
    forest = Forest((*SFT().trees(forests.view(0, IDS, weights=WEIGHTS)), *forests.rows(2, seed=3)))
    report = SFT().loss(model.token_outputs(forest), forest)
    expected = forests.brute_loss(forests.zoo("llama", ours=False), forest)
    assert report.sum.item() == pytest.approx(expected.item(), rel=1e-5)
    assert report.weight == forest.weight == 3.5 + sum(tree.weight for tree in forest.trees[1:])
