"""The reference policy: what the model says of each trained token with every adapter switched off.

Idea: an objective that holds a policy near to where it began compares both on the same tokens. The adapter switched off
is where it began, so there is no second model: the trees of a micro-batch go through the model once more, without a
graph, and what comes out is noted on them. Where the weights themselves are trained, their originals are kept aside
by the attachment and stand in.
Source: Rafailov et al., arXiv 2305.18290, section 4 (the reference of DPO); Ouyang et al., arXiv 2203.02155, section
    3.5 (the KL penalty of PPO).
Cost: one forward pass over the tokens of the micro-batch, for trees that bear no such note yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import torch

from luthier.data.forest import Floats, Forest, Tree
from luthier.model.language_model import LanguageModel


def noted(
    model: LanguageModel,
    forest: Forest,
    wanted: Callable[[Tree], bool],
    *,
    temperature: float,
    reference: LanguageModel | None = None,
) -> Forest:
    """The forest with the note "reference" on those trees that are `wanted` and do not bear it yet.

    A `reference` is given where the model has no adapter that could be switched off: it was saved as a whole.
    """
    places = [index for index, tree in enumerate(forest.trees) if wanted(tree) and not _has_reference(tree)]
    if not places:
        return forest
    bare = Forest(tuple(replace(forest.trees[place], adapter="") for place in places))
    model = model if reference is None else reference
    training = model.module.training
    # Without dropout: a reference that wavers is none.
    model.train(False)
    try:
        with torch.no_grad(), model.without_attachments():
            said = model.token_outputs(bare, temperature=temperature).log_probs.float().cpu().numpy()
    finally:
        model.train(training)
    trees, start = list(forest.trees), 0
    for place in places:
        count = sum(int(np.count_nonzero(segment.weighted)) for segment in trees[place].segments)
        trees[place] = _with(trees[place], said[start : start + count])
        start += count
    return Forest(tuple(trees))


@torch.no_grad()
def mean_log_ratio(
    model: LanguageModel, forests: Iterable[Forest], *, temperature: float, reference: LanguageModel | None = None
) -> float:
    """The mean over trees of how much more likely the policy finds them than the reference does, without dropout."""
    total, count = 0.0, 0
    training = model.module.training
    for bare in forests:
        forest = noted(model, bare, lambda tree: True, temperature=temperature, reference=reference)
        model.train(False)
        try:
            outputs = model.token_outputs(forest, temperature=temperature)
        finally:
            model.train(training)
        total += float((outputs.log_probs - outputs.notes["reference"]).double().sum())
        count += len(forest.trees)
    return total / count


def _has_reference(tree: Tree) -> bool:
    return any("reference" in (segment.notes or {}) for segment in tree.segments)


def _with(tree: Tree, said: Floats) -> Tree:
    segments, start = [], 0
    for segment in tree.segments:
        count = int(np.count_nonzero(segment.weighted))
        segments.append(segment.noting("reference", said[start : start + count]) if count else segment)
        start += count
    return replace(tree, segments=tuple(segments))
