"""The reference policy: what another policy says of each trained token, noted on it before a loss looks at it.

Idea: an objective that holds a policy near to where it began compares both on the same tokens. The adapter switched off
is where it began, so there is no second model: the trees of a micro-batch go through the model once more, without a
graph, and what comes out is noted on them. Where the weights themselves are trained, their originals are kept aside
by the attachment and stand in. A teacher is a reference too, which the policy shall come near to: another model, or the
same one that reads something in front of each text. Where its whole distribution is asked for, it is compared token
by token (model/teaching.py) instead of noted.
Source: Rafailov et al., arXiv 2305.18290, section 4 (the reference of DPO); Ouyang et al., arXiv 2203.02155, section
    3.5 (the KL penalty of PPO); a prompt in front: Snell et al., arXiv 2209.15189 (context distillation).
Cost: one forward pass over the tokens of the micro-batch, for trees that bear no such note yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch

from luthier.core.errors import DataError
from luthier.data.forest import Floats, Forest, Ints, Tree
from luthier.maths.divergences import Comparison
from luthier.model.language_model import LanguageModel
from luthier.model.running.outputs import TokenOutputs
from luthier.model.teaching import compared_outputs, taught


@dataclass(frozen=True)
class Front:
    """What a teacher reads where texts begin: tokens that are `put` in the place of those `removed`, as all begin."""

    removed: Ints
    put: Ints

    def before(self, tree: Tree) -> Tree:
        """A tree as the teacher reads it; its trained tokens are the same. Raises DataError where it cannot."""
        count = len(self.removed)
        begins = not tree.segments[0].weights[:count].any()
        root, *rest = tree.segments
        if not begins or len(root.tokens) <= count or not np.array_equal(root.tokens[:count], self.removed):
            raise DataError(
                f"row {tree.row} begins with tokens {root.tokens[:count].tolist()}, and a teacher's prompt stands in "
                f"the place of {self.removed.tolist()}",
                allowed="rows that begin as the chat template begins without a system message",
                do="take the system messages out of the rows, or reference.prompt out of the recipe",
            )
        weights = root.weights[count:].copy()
        # Nothing predicts a first token; with something in front of it, something would.
        weights[: 1 - min(count, 1)] = 0
        tokens = np.concatenate([self.put, root.tokens[count:]]).astype(np.int32)
        longer = np.concatenate([np.zeros(len(self.put), np.float32), weights])
        return replace(tree, segments=(replace(root, tokens=tokens, weights=longer, notes=None), *rest))


@dataclass(frozen=True)
class Reference:
    """Whose word is asked: that of `model`, or of the trained one without its adapters, which reads `front` first."""

    model: LanguageModel | None = None
    front: Front | None = None

    @property
    def digest(self) -> str:
        """What identifies another model; empty for the trained one itself."""
        if self.model is None:
            return ""
        return ".".join([self.model.digest, *(each.trained_digest() for each in self.model.attachments.values())])

    def read(self, trees: Iterable[Tree]) -> Forest:
        """Trees as it reads them: by no adapter."""
        bare = (replace(tree, adapter="") for tree in trees)
        return Forest(tuple(bare if self.front is None else map(self.front.before, bare)))


ITSELF: Final = Reference()
"""The model that is trained, with every adapter switched off."""


def noted(
    model: LanguageModel,
    forest: Forest,
    wanted: Callable[[Tree], bool],
    *,
    temperature: float,
    reference: Reference = ITSELF,
) -> Forest:
    """The forest with the note "reference" on those trees that are `wanted` and do not bear it yet."""
    places = [index for index, tree in enumerate(forest.trees) if wanted(tree) and not _has_reference(tree)]
    if not places:
        return forest
    bare = reference.read(forest.trees[place] for place in places)
    model = model if reference.model is None else reference.model
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
        count = trained_count(trees[place])
        trees[place] = with_reference(trees[place], said[start : start + count])
        start += count
    return Forest(tuple(trees))


def looked_at(
    model: LanguageModel,
    forest: Forest,
    comparison: Comparison | None,
    *,
    temperature: float,
    reference: Reference = ITSELF,
) -> TokenOutputs:
    """The outputs of a forest, with the divergence from the reference's whole distribution where one is compared."""
    if comparison is None:
        return model.token_outputs(forest, temperature=temperature)
    teacher = model if reference.model is None else reference.model
    training = teacher.module.training
    teacher.train(False)
    try:
        with teacher.without_attachments():
            told = taught(teacher, reference.read(forest.trees), temperature=temperature)
    finally:
        teacher.train(training)
    return compared_outputs(model, forest, told, comparison, temperature=temperature)


@torch.no_grad()
def mean_log_ratio(
    model: LanguageModel, forests: Iterable[Forest], *, temperature: float, reference: Reference = ITSELF
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


def trained_count(tree: Tree) -> int:
    """How many of its tokens are trained."""
    return sum(int(np.count_nonzero(segment.weighted)) for segment in tree.segments)


def _has_reference(tree: Tree) -> bool:
    return any("reference" in (segment.notes or {}) for segment in tree.segments)


def with_reference(tree: Tree, said: Floats) -> Tree:
    """The tree with what the reference has said of its trained tokens, in their order."""
    segments, start = [], 0
    for segment in tree.segments:
        count = int(np.count_nonzero(segment.weighted))
        segments.append(segment.noting("reference", said[start : start + count]) if count else segment)
        start += count
    return replace(tree, segments=tuple(segments))
