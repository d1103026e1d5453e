"""Unrolled paths: every way from a root to a leaf of a forest as a plain row of a right-padded batch.

Idea: shared tokens are computed once for each path but carry weight only in the first, so losses and gradients are
those of the forest in one flat pass (see executor.py).
Use when: a model's attention cannot be driven, or its mixing is none; it works for any causal model.
Not when: a flat pass does; it computes what texts have in common once.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from luthier.core.errors import RecipeError
from luthier.data.forest import Forest, Segment, Tree
from luthier.model.editing.edits import LearnedRoot, routed
from luthier.model.editing.value_head import ValueHead
from luthier.model.routes import Mixes, Routes, padded_routes, predicted_routes
from luthier.model.running.guests import Guest, mixes_of
from luthier.model.running.outputs import TokenOutputs
from luthier.model.running.scoring import AnyHead, long, outputs_of, scored, valued
from luthier.model.zoo import ZooModule


def run_unrolled(
    module: ZooModule,
    forest: Forest,
    *,
    head: AnyHead,
    root: LearnedRoot | None = None,
    guests: Mapping[str, Guest] | None = None,
    values: ValueHead | None = None,
) -> TokenOutputs:
    """Every path of every tree as a row of a right-padded batch."""
    if root is not None or any(guest.root is not None for guest in (guests or {}).values()):
        raise RecipeError(
            "this model's attention cannot be driven by luthier, and learned roots need it",
            do="choose an adapter that works at sites, such as lora",
        )
    unrolled, predicting, order, row_routes = _unrolled(module, forest, mixes_of(guests or {}))
    log_probs = scored(module, predicting, head, long(unrolled.layout.labels, module), row_routes, guests or {})
    original = forest.layout
    worth = valued(predicting, row_routes, guests or {}) if values is None else values.values(predicting)
    # Paths visit tokens in another order than the flat forest; objectives always see the forest's own.
    back = long(np.argsort(order, kind="stable"), module)
    ordered = None if worth is None else worth.index_select(0, back)
    return outputs_of(original, log_probs.index_select(0, back), module, values=ordered)


def unrolled_states(module: ZooModule, forest: Forest) -> Float[Tensor, "N d"]:
    """The final states from which the weighted tokens of a forest are predicted, by every path as a row of its own."""
    _, predicting, order, _ = _unrolled(module, forest, {})
    return predicting.index_select(0, long(np.argsort(order, kind="stable"), module))


def _unrolled(
    module: ZooModule, forest: Forest, mixes: Mixes
) -> tuple[Forest, Float[Tensor, "N d"], np.ndarray, Routes | None]:
    """The paths of a forest, the states that predict their weighted tokens, the place of each in the forest's layout,
    and by which adapters they went."""
    rows, order = paths(forest)
    width = max(len(path.segments[0].tokens) for path in rows)
    tokens = np.zeros((len(rows), width), dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    for index, path in enumerate(rows):
        count = path.token_count
        tokens[index, :count] = path.segments[0].tokens
        mask[index, :count] = 1
    unrolled = Forest(tuple(rows))
    layout, routes = unrolled.layout, padded_routes(unrolled, width, mixes)
    ids = torch.from_numpy(tokens).to(module.device)
    attention_mask = torch.from_numpy(mask).to(module.device)
    with routed(module.base_model, routes):
        states = module.base_model(input_ids=ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    starts = np.array([span.start for span in layout.spans], dtype=np.int64)
    columns = layout.predictors - starts[layout.trees]
    predicting = states[long(layout.trees, module), long(columns, module)]
    return unrolled, predicting, order, None if routes is None else predicted_routes(unrolled)


def paths(forest: Forest) -> tuple[list[Tree], np.ndarray]:
    """Each path as a one-segment tree, and for each weighted token of all paths its index in the forest's layout."""
    rows: list[Tree] = []
    order: list[int] = []
    base = 0
    for tree in forest.trees:
        firsts: dict[int, int] = {}
        for index, segment in enumerate(tree.segments):
            firsts[index] = base
            skip = 1 if segment.parent < 0 else 0
            base += int(np.count_nonzero(segment.weights[skip:]))
        counted: set[int] = set()
        for path in tree.paths():
            weights = []
            for index in path:
                segment = tree.segments[index]
                fresh = index not in counted
                weights.append(segment.weights if fresh else np.zeros_like(segment.weights))
                if fresh:
                    counted.add(index)
                    skip = 1 if segment.parent < 0 else 0
                    order.extend(range(firsts[index], firsts[index] + int(np.count_nonzero(segment.weights[skip:]))))
            joined = np.concatenate([tree.segments[index].tokens for index in path])
            rows.append(Tree((Segment(joined, np.concatenate(weights)),), row=tree.row, adapter=tree.adapter))
    return rows, np.array(order, dtype=np.int64)
