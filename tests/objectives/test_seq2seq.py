"""Seq2seq: what is read and what is said, and the zoo's own loss on the answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from luthier.core.errors import DataError
from luthier.data.forest import Forest
from luthier.objectives.seq2seq import Seq2Seq
from tests import forests, task_models
from tests.task_models import ANSWERS


def test_a_row_is_a_text_and_its_right_answer_behind_the_start_token() -> None:
    """Breaks when a wrong answer is imitated, or the start token carries loss."""
    (view, *_) = task_models.views_for(Seq2Seq())
    (tree,) = Seq2Seq().trees(view)
    read, said = tree.segments
    size = len(read.tokens)
    assert read.both_ways and not read.weights.any() and not said.both_ways and said.parent == 0
    assert said.tokens.tolist() == [0, *view.tokens[size + 1 : 2 * size + 1].tolist()]
    assert said.weights.tolist() == [0.0, *[1.0] * size]


def test_the_loss_is_the_zoos_own() -> None:
    """Breaks when an answer is shifted by one against its labels."""
    model = task_models.language_model("t5", ANSWERS)
    trees = [tree for view in task_models.views_for(Seq2Seq()) for tree in Seq2Seq().trees(view)]
    forest = Forest(tuple(trees))
    report = Seq2Seq().loss(model.token_outputs(forest), forest)
    expected = 0.0
    for tree in trees:
        read, said = (torch.from_numpy(part.tokens.astype(np.int64)) for part in tree.segments)
        expected += float(model.module(input_ids=read[None], labels=said[None, 1:]).loss) * (len(said) - 1)
    assert report.sum.item() == pytest.approx(expected, rel=1e-5) and report.weight == forest.weight


def test_a_row_of_another_kind_is_refused() -> None:
    """Breaks when a text without an answer is read as if it were one."""
    with pytest.raises(DataError, match="row 2 has no answer"):
        Seq2Seq().trees(forests.view(2, np.arange(5, 9).astype(np.int32), role="text"))
