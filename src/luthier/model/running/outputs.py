"""What a forest through a model gives to objectives, and what an objective gives back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from luthier.data.forest import Forest, Note


@dataclass(frozen=True)
class TokenOutputs:
    """One entry for each token with weight, in the order of `Layout`.

    `log_probs` are differentiable and in float32; `rows` and `trees` say where a token comes from. A task that has C
    classes gives the log-probabilities of all of them in `classes`, differentiable too; one that scores texts gives
    `scores`, and its log-probabilities are 0. `divergences`, differentiable, say how far the policy is from a teacher
    at each token, where that was asked for; log-probabilities then have no gradient. `values` are those of a value
    head: of the state in which each token was chosen. `notes` are what the forest has noted of the tokens.
    """

    log_probs: Float[Tensor, " N"]
    labels: Int[Tensor, " N"]
    weights: Float[Tensor, " N"]
    rows: Int[Tensor, " N"]
    trees: Int[Tensor, " N"]
    classes: Float[Tensor, "N C"] | None = None
    scores: Float[Tensor, " N"] | None = None
    values: Float[Tensor, " N"] | None = None
    divergences: Float[Tensor, " N"] | None = None
    notes: Mapping[Note, Float[Tensor, " N"]] = field(default_factory=dict)


def of_trees(forest: Forest, outputs: TokenOutputs, places: Sequence[int]) -> tuple[Forest, TokenOutputs]:
    """Some trees of a forest and what came out for them, as if no others had been there."""
    new = torch.full((len(forest.trees),), -1, dtype=outputs.trees.dtype, device=outputs.trees.device)
    new[list(places)] = torch.arange(len(places), dtype=new.dtype, device=new.device)
    trees = new[outputs.trees]
    kept = (trees >= 0).nonzero()[:, 0]
    own = TokenOutputs(
        log_probs=outputs.log_probs.index_select(0, kept),
        labels=outputs.labels[kept],
        weights=outputs.weights[kept],
        rows=outputs.rows[kept],
        trees=trees[kept],
        values=None if outputs.values is None else outputs.values.index_select(0, kept),
        divergences=None if outputs.divergences is None else outputs.divergences.index_select(0, kept),
        notes={note: values[kept] for note, values in outputs.notes.items()},
    )
    return Forest(tuple(forest.trees[place] for place in places)), own


@dataclass(frozen=True)
class LossReport:
    """A loss as a sum and the weight it must be divided by, never a mean.

    The loop divides once, by the weight of the whole optimizer step, so cutting a step into micro-batches, packing it
    or splitting it over devices cannot change a gradient. `metrics` are sums too, each with its own weight.
    `tree_losses` are those of single trees, where a row's loss is something else than its tokens' log-probabilities.
    `most` are metrics of which the largest counts.
    """

    sum: Float[Tensor, ""]
    weight: float
    metrics: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    tree_losses: Float[Tensor, " trees"] | None = None
    most: Mapping[str, float] = field(default_factory=dict)
