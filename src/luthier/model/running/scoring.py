"""From final states to what objectives see: log-probabilities of labels, logits of a few rows, values.

Idea: whichever way a forest went through a model, its head is asked for the rows that carry weight and no others, by
our operations where it is a plain product, else by the zoo's own layer. Rows of several adapters may each have a head
of their own.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from luthier.data.forest import Layout
from luthier.kernels.head import Head, head_log_probs, head_logits
from luthier.model.routes import Routes
from luthier.model.running.guests import Guest
from luthier.model.running.head import EditedHead
from luthier.model.running.outputs import TokenOutputs
from luthier.model.running.zoo_head import FeatureHead
from luthier.model.zoo import ZooModule

AnyHead = Head | EditedHead | FeatureHead | None
"""A head as tensors, one with edits around it, one with layers of the zoo's before it, or None when only the zoo's own
layer computes the logits."""


def score(
    module: ZooModule, hidden: Float[Tensor, "N d"], head: AnyHead, labels: Int[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """log p(label) of each row, by our chunked head or, when there is none, by the zoo's output layer."""
    if isinstance(head, FeatureHead):
        hidden, head = head.features(hidden), head.plain
    if isinstance(head, Head):
        return head_log_probs(hidden, head, labels)
    if len(labels) == 0:
        return hidden.sum(-1)
    parts = []
    for rows in torch.arange(len(labels), device=labels.device).split(256):
        layer = head.logits if head is not None else module.get_output_embeddings()
        logits = layer(hidden[rows]).float()  # type: ignore[misc]
        parts.append(torch.log_softmax(logits, -1).gather(1, labels[rows, None])[:, 0])
    return torch.cat(parts)


def logits_of(module: ZooModule, hidden: Float[Tensor, "n d"], head: AnyHead) -> Float[Tensor, "n V"]:
    """The logits of a few rows, without a graph, by our head or the zoo's output layer: in float32, or rounded as the
    product gives them."""
    if isinstance(head, FeatureHead):
        hidden, head = head.features(hidden), head.plain
    if isinstance(head, Head):
        return head_logits(hidden, head)
    layer = head.logits if head is not None else module.get_output_embeddings()
    logits: Tensor = layer(hidden)  # type: ignore[misc]
    return logits.float()


def outputs_of(
    layout: Layout,
    log_probs: Float[Tensor, " N"],
    module: ZooModule,
    *,
    values: Float[Tensor, " N"] | None = None,
    divergences: Float[Tensor, " N"] | None = None,
) -> TokenOutputs:
    """What objectives see of the weighted tokens of a forest."""
    return TokenOutputs(
        log_probs=log_probs,
        labels=long(layout.labels, module),
        weights=torch.from_numpy(layout.weights).to(module.device),
        rows=long(layout.rows, module),
        trees=long(layout.trees, module),
        values=values,
        divergences=divergences,
        notes={name: torch.from_numpy(each).to(module.device) for name, each in layout.notes.items()},
    )


def long(array: np.ndarray, module: ZooModule) -> Int[Tensor, " n"]:
    """An array of whole numbers on the device of a model."""
    return torch.from_numpy(array.astype(np.int64, copy=False)).to(module.device)


def scored(
    module: ZooModule,
    hidden: Float[Tensor, "N d"],
    head: AnyHead,
    labels: Int[Tensor, " N"],
    routes: Routes | None,
    guests: Mapping[str, Guest],
) -> Float[Tensor, " N"]:
    """`score`, where rows of several adapters may each have a head of their own."""
    if routes is None or not routes.runs:
        return score(module, hidden, head, labels)
    heads = {name: guests[name].head for name in routes.names}
    if all(each is None or (isinstance(each, Head) and not each.changes) for each in heads.values()):
        # Nobody has changed it.
        return score(module, hidden, heads[routes.names[0]], labels)
    parts = zip(routes.runs, hidden.split(routes.sizes), labels.split(routes.sizes), strict=True)
    return torch.cat([score(module, states, heads[run.adapter], own) for run, states, own in parts])


def valued(
    hidden: Float[Tensor, "N d"], routes: Routes | None, guests: Mapping[str, Guest]
) -> Float[Tensor, " N"] | None:
    """The values of rows of several adapters; 0 for those of an adapter without a value head, None without any."""
    if routes is None or all(guest.values is None for guest in guests.values()):
        return None
    heads = [guests[run.adapter].values for run in routes.runs]
    parts = zip(heads, hidden.split(routes.sizes), strict=True)
    found = [
        states.new_zeros(len(states), dtype=torch.float32) if head is None else head.values(states)
        for head, states in parts
    ]
    return torch.cat(found)
