"""Recall: what the model says of answers just sampled, noted on them before the first step that learns from them.

Idea: a rollout that is used for several steps needs a point from which ratios are counted. Taken from the trainer, in
evaluation mode, they are 1 at the first step to the last bits: what is cut off later is then what steps have changed,
and not how the sampler rounds. What the sampler said stays beside it, so that the two can be compared.
Cost: a forward pass without a graph over prompt and answers; one more without the adapter for a reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from luthier.core.errors import RecipeError
from luthier.data.forest import Floats, Forest, Note, Tree, pack
from luthier.data.rollouts import noting
from luthier.train.reference import noted
from luthier.train.stepper import Stepper


@torch.no_grad()
def recall(stepper: Stepper, trees: Sequence[Tree], wanted: frozenset[Note]) -> list[Tree]:
    """The trees with the notes that are `wanted`, out of "old", "reference" and "value"."""
    if not wanted:
        return list(trees)
    model, temperature = stepper.model, stepper.objective.policy_temperature
    training = model.module.training
    model.train(False)
    found: list[Tree] = []
    try:
        for forest in pack(stepper.batcher.named(stepper.name, trees), max_tokens=stepper.micro_tokens):
            if "reference" in wanted:
                forest = noted(
                    model, forest, lambda tree: True, temperature=temperature, reference=stepper.batcher.reference
                )
            if wanted & {"old", "value"}:
                forest = _own(stepper, forest, wanted, temperature)
            found += forest.trees
    finally:
        model.train(training)
    return found


def _own(stepper: Stepper, forest: Forest, wanted: frozenset[Note], temperature: float) -> Forest:
    """What the model itself says, and its value head."""
    outputs = stepper.model.token_outputs(forest, temperature=temperature)
    said: dict[Note, Floats] = {"old": outputs.log_probs.float().cpu().numpy()}
    if "value" in wanted:
        if outputs.values is None:
            raise RecipeError(
                f"the objective {stepper.objective.method_name()} is given no values",
                allowed="a model with a value head",
                do="attach what own() gives with the adapter",
            )
        said["value"] = outputs.values.float().cpu().numpy()
    trees, start = [], 0
    for tree in forest.trees:
        sizes = [int(np.count_nonzero(leaf.weighted)) for leaf in tree.segments[1:]]
        ends = start + np.cumsum(sizes)
        for note in wanted & set(said):
            parts = [said[note][end - size : end] for size, end in zip(sizes, ends, strict=True)]
            tree = noting(tree, note, parts)
        start = int(ends[-1])
        trees.append(tree)
    return Forest(tuple(trees))
