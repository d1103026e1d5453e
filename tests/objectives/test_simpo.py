"""SimPO: means of tokens, and a margin."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from luthier.data.forest import Forest
from luthier.objectives.simpo import SimPO
from tests import forests, task_models


@pytest.mark.parametrize("sft", [0.0, 0.4])
def test_the_loss_is_that_of_the_paper(sft: float) -> None:
    """Breaks when a long answer counts more than a short one, or the margin is left out."""
    method = SimPO(beta=1.5, gamma=0.6, sft=sft)
    model = forests.language_model("llama")
    rng = np.random.default_rng(0)
    views = [task_models.answered(view, rng, answers=2 + view.row) for view in forests.views(3, seed=5)]
    trees = tuple(tree for view in views for tree in method.trees(view))
    forest = Forest(trees)
    said = model.token_outputs(forest)
    means = [each.mean() for each in said.log_probs.split([len(leaf.tokens) for t in trees for leaf in t.segments[1:]])]
    total, start = torch.zeros(()), 0
    for tree in trees:
        own = means[start : start + len(tree.segments) - 1]
        start += len(own)
        pairs = [(i, j) for i in range(len(own)) for j in range(i + 1, len(own))]
        for i, j in pairs:
            total = total - torch.nn.functional.logsigmoid(1.5 * (own[i] - own[j]) - 0.6) / len(pairs)
        total = total - sft * own[0]
    report = method.loss(said, forest)
    assert float(report.sum.detach()) == pytest.approx(float(total.detach()), rel=1e-5)
    assert report.weight == pytest.approx(3.0)
