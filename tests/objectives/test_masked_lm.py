"""Masked language modelling: which tokens are hidden and how, anew in each epoch, and the loss on them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from luthier.core.chosen import choose
from luthier.core.errors import RecipeError
from luthier.data.forest import Forest
from luthier.data.rendering.rendered import Rendered
from luthier.objectives import Objective, Vocabulary
from luthier.objectives.masked_lm import MaskedLM
from tests import forests, task_models
from tests.task_models import MASKED

MASK = 2
SIZE = 128


def long_view(count: int = 40_000) -> Rendered:
    ids = np.random.default_rng(0).integers(3, SIZE, count).astype(np.int32)
    weights = np.ones(count, np.float32)
    weights[0] = weights[-1] = 0
    return replace(forests.view(4, ids, weights=weights, role="text"), types=np.zeros(count, np.uint8))


def bound(**knobs: object) -> MaskedLM:
    return MaskedLM(**knobs).with_vocabulary(Vocabulary(SIZE, MASK))  # type: ignore[arg-type]


def test_shares_are_those_of_the_paper_and_control_tokens_stay() -> None:
    """Breaks when more or fewer tokens are chosen, all chosen ones are masked, or [CLS] is hidden."""
    view = long_view()
    (segment,) = bound().trees(view)[0].segments
    chosen = segment.weights > 0
    assert segment.labels is not None and np.array_equal(segment.labels, view.tokens)
    assert not chosen[0] and not chosen[-1]
    assert np.array_equal(segment.tokens[~chosen], view.tokens[~chosen])
    hidden = segment.tokens[chosen] == MASK
    kept = segment.tokens[chosen] == view.tokens[chosen]
    assert chosen.mean() == pytest.approx(0.15, abs=0.01)
    assert hidden.mean() == pytest.approx(0.8, abs=0.02)
    # A random token is now and then the one that was there.
    assert kept.mean() == pytest.approx(0.1 + 0.1 / SIZE, abs=0.01)


def test_each_epoch_and_each_window_of_a_text_hides_others() -> None:
    """Breaks when the same tokens are hidden for ever, or two windows of a row by the same pattern."""
    view = long_view(400)
    first, again, next_epoch = (bound().trees(view, epoch=epoch)[0].segments[0].weights for epoch in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, next_epoch)
    other = replace(view, tokens=view.tokens[::-1].copy())
    assert not np.array_equal(first, bound().trees(other)[0].segments[0].weights)


def test_a_short_text_has_one_hidden_token_at_least() -> None:
    """Breaks when a row teaches nothing because nothing was drawn."""
    view = replace(long_view(4), row=0)
    for epoch in range(40):
        assert np.count_nonzero(bound(rate=0.01).trees(view, epoch=epoch)[0].segments[0].weights) == 1


def test_the_loss_is_the_zoos_own_on_the_hidden_tokens() -> None:
    """Breaks when the head's layers before the last one are left out, or unhidden tokens carry loss."""
    model = task_models.language_model("bert", MASKED)
    trees = [tree for view in task_models.views_for(bound(rate=0.4)) for tree in bound(rate=0.4).trees(view)]
    forest = Forest(tuple(trees))
    report = bound().loss(model.token_outputs(forest), forest)
    expected = 0.0
    for tree in trees:
        (segment,) = tree.segments
        assert segment.labels is not None
        labels = torch.from_numpy(np.where(segment.weights > 0, segment.labels, -100).astype(np.int64))
        given = torch.from_numpy(segment.tokens.astype(np.int64))[None]
        loss = model.module(given, labels=labels[None]).loss
        expected += float(loss) * float(segment.weights.sum())
    assert isinstance(model.module, transformers.BertForMaskedLM)
    assert report.sum.item() == pytest.approx(expected, rel=1e-5) and report.weight == forest.weight


def test_a_tokenizer_without_a_mask_is_told() -> None:
    """Breaks when a decoder's tokenizer hides tokens behind one of its words."""
    with pytest.raises(RecipeError, match="mask token is None"):
        MaskedLM().with_vocabulary(Vocabulary(SIZE))
    assert MaskedLM(mask_token=5).with_vocabulary(Vocabulary(SIZE)).mask_token == 5
    with pytest.raises(RecipeError, match="does not know its mask token"):
        MaskedLM().trees(long_view(5))
    with pytest.raises(RecipeError, match="1 together"):
        choose("objectives", Objective, {"method": "masked_lm", "masked": 0.8, "random": 0.3})
