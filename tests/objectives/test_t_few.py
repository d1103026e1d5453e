"""T-Few: its three losses against the paper's formulas, one row at a time, and the choice by mean log-probability."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from luthier.core.errors import DataError
from luthier.data.forest import Forest, Tree
from luthier.model.language_model import LanguageModel
from luthier.objectives.t_few import TFew
from tests import forests, task_models
from tests.task_models import ANSWERS


def by_the_paper(model: LanguageModel, tree: Tree) -> tuple[float, float, float, bool]:
    """L_LM, L_UL and L_LN of one row, and whether the right answer has the best mean."""
    read, *answers = tree.segments
    given = torch.from_numpy(read.tokens.astype(np.int64))[None]
    each = []
    for answer in answers:
        said = torch.from_numpy(answer.tokens.astype(np.int64))
        logits = model.module(input_ids=given, decoder_input_ids=said[None]).logits[0].double()
        each.append(torch.log_softmax(logits, -1)[:-1].gather(1, said[1:, None])[:, 0])
    means = torch.stack([one.mean() for one in each])
    wrong = torch.cat(each[1:])
    unlikely = -torch.log(1 - wrong.exp()).mean()
    chosen = -torch.log_softmax(means, 0)[0]
    return float(-means[0]), float(unlikely), float(chosen), bool(means.argmax() == 0)


@pytest.mark.parametrize(("u", "l"), [(1.0, 1.0), (0.0, 0.0), (0.5, 2.0)])
def test_the_losses_are_the_papers(u: float, l: float) -> None:  # noqa: E741
    """Breaks when a mean is over all rows' tokens, or a wrong answer of one row competes in another."""
    model = task_models.language_model("t5", ANSWERS)
    method = TFew(unlikelihood=u, length_normalised=l)
    trees = [tree for view in task_models.views_for(method, 6) for tree in method.trees(view)]
    forest = Forest(tuple(trees))
    report = method.loss(model.token_outputs(forest), forest)
    found = [by_the_paper(model, tree) for tree in trees]
    assert report.sum.item() == pytest.approx(sum(a + u * b + l * c for a, b, c, _ in found), rel=1e-5)
    assert report.weight == pytest.approx(6.0) and forest.weight == report.weight
    assert report.metrics["accuracy"] == (float(sum(right for *_, right in found)), 6.0)


def test_a_row_weighs_one_however_many_answers_it_has() -> None:
    """Breaks when rows with longer or more answers count for more."""
    for view in task_models.views_for(TFew()):
        (tree,) = TFew().trees(view)
        assert tree.weight == pytest.approx(1.0)
        assert all(float(part.weights[1:].min()) > 0 for part in tree.segments[1:])


def test_a_row_with_only_the_right_answer_is_imitated_and_one_without_is_refused() -> None:
    """Breaks when a mean over no wrong answer is not a number."""
    model = task_models.language_model("t5", ANSWERS)
    (view, *_) = task_models.views_for(TFew())
    size = len(view.tokens) // 4
    cut = 2 * (len(view.tokens) - 2) // 3 + 1
    alone = replace(view, **{key: getattr(view, key)[:cut] for key in ("tokens", "weights", "roles", "spans")})
    (tree,) = TFew().trees(alone)
    forest = Forest((tree,))
    report = TFew().loss(model.token_outputs(forest), forest)
    assert size and len(tree.segments) == 2 and tree.weight == pytest.approx(1.0)
    assert report.sum.item() == pytest.approx(by_the_paper_alone(model, tree), rel=1e-5)
    wrong = forests.view(1, view.tokens, roles=np.where(view.roles == 3, view.roles[-1], view.roles).tolist())
    with pytest.raises(DataError, match="no right answer"):
        TFew().trees(wrong)


def by_the_paper_alone(model: LanguageModel, tree: Tree) -> float:
    read, said = (torch.from_numpy(part.tokens.astype(np.int64)) for part in tree.segments)
    return float(model.module(input_ids=read[None], labels=said[None, 1:]).loss)
