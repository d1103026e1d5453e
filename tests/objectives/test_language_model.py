"""Language modelling: every token carries loss, and overlaps of pieces carry it once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from luthier.data.forest import Forest
from luthier.objectives.language_model import LanguageModelling
from tests import forests

IDS = np.array([5, 6, 7, 8], dtype=np.int32)
WEIGHTS = np.array([0, 0, 1, 0.5], dtype=np.float32)


def test_all_tokens_of_a_conversation_carry_loss() -> None:
    """Breaks when the data's own answer mask is left on."""
    (tree,) = LanguageModelling().trees(forests.view(2, IDS, weights=WEIGHTS, role="assistant"))
    assert tree.segments[0].weights.tolist() == [1, 1, 1, 1] and tree.row == 2
    assert Forest((tree,)).weight == 3.0


def test_pieces_of_a_text_keep_their_weights() -> None:
    """Breaks when the overlap of two pieces is trained on twice."""
    (tree,) = LanguageModelling().trees(forests.view(0, IDS, weights=WEIGHTS, role="text"))
    assert tree.segments[0].weights.tolist() == WEIGHTS.tolist()


def test_the_loss_is_the_zoos_own_over_all_tokens() -> None:
    """Breaks when the first token is predicted by something, or the last is not."""
    model = forests.language_model("gpt2")
    forest = Forest(tuple(LanguageModelling().trees(forests.view(0, IDS, weights=WEIGHTS))))
    report = LanguageModelling().loss(model.token_outputs(forest), forest)
    ids = torch.from_numpy(IDS.astype(np.int64))[None]
    expected = forests.zoo("gpt2", ours=False)(input_ids=ids, labels=ids).loss.item()
    assert report.sum.item() / report.weight == pytest.approx(expected, rel=1e-5)
