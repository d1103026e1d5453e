"""Executors: a forest through a model, by segment or by unrolled paths, with the same losses and gradients.

By segment: one flat pass over all tokens; attention sees a `ForestPlan` (see attention.py), everything else works token
by token anyway. By mask: the same pass, on a GPU, with attention as one call (see block_mask.py). Unrolled: every way
from a root to a leaf is a plain row of a right-padded batch; shared tokens are computed once for each path but carry
weight only in the first. Unrolled works for any causal model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from luthier.core.errors import RecipeError, UndrivableAttentionError
from luthier.data.forest import Forest, Layout, Segment, Span, Tree
from luthier.kernels.backend import Backend
from luthier.kernels.head import Head, head_log_probs, head_logits
from luthier.model.attending.attention import ForestPlan, Root
from luthier.model.attending.block_mask import MaskedAttention
from luthier.model.editing.edits import LearnedKeysValues, LearnedPrompt, LearnedRoot, routed
from luthier.model.editing.value_head import ValueHead
from luthier.model.routes import Mixes, Routes, padded_routes, predicted_routes, routes_of, whole
from luthier.model.running.blocks import Blocks
from luthier.model.running.guests import Guest, first_positions, mixes_of, side_by_side
from luthier.model.running.head import EditedHead
from luthier.model.running.outputs import TokenOutputs
from luthier.model.running.zoo_head import FeatureHead

AnyHead = Head | EditedHead | FeatureHead | None
"""A head as tensors, one with edits around it, one with layers of the zoo's before it, or None when only the zoo's own
layer computes the logits."""

@dataclass(frozen=True)
class Entry:
    """What the zoo's embeddings are told of a flat batch: the number of the first position, and whether token types."""

    first_position: int = 0
    types: bool = False


PLAIN: Final = Entry()


@dataclass(frozen=True)
class Executor:
    """Which executor runs a model, whether the head is computed by luthier, and why not when it is not.

    `backend` computes that head, and what lies between the products of `blocks`. `by_mask` makes one call of the
    attention of many segments; without it each is a call of its own, which is what a CPU does best.
    """

    kind: Literal["segments", "unrolled"]
    own_head: bool
    backend: Backend
    reason: str = ""
    blocks: Blocks | None = None
    by_mask: MaskedAttention | None = None
    entry: Entry = PLAIN


def run_segments(
    module: PreTrainedModel,
    forest: Forest,
    *,
    head: AnyHead,
    root: LearnedRoot | None = None,
    blocks: Blocks | None = None,
    by_mask: MaskedAttention | None = None,
    guests: Mapping[str, Guest] | None = None,
    values: ValueHead | None = None,
) -> TokenOutputs:
    """One flat pass over the forest, attention by segment or `by_mask`, with `blocks` by our own operations.

    `guests` are the adapters that trees name; where they do, `head`, `root` and `values` are those of the guests.
    """
    mixes = mixes_of(guests or {})
    layout, routes = forest.layout, routes_of(forest, mixes)
    labels = long(layout.labels, module)
    if routes is None:
        predicting = predicting_states(module, layout, root=root, blocks=blocks, by_mask=by_mask)
        worth = None if values is None else values.values(predicting)
        return outputs_of(layout, score(module, predicting, head, labels), module, values=worth)
    roots = _seen_roots(module, routes.names, guests or {}, blocks)
    rows = predicted_routes(forest, mixes)
    plan = ForestPlan(
        spans=layout.spans, by_mask=by_mask, routes=routes, row_routes=rows, root=side_by_side(forest, roots)
    )
    positions = long(layout.positions, module) + long(first_positions(forest, roots), module)
    tokens, predictors = long(layout.tokens, module), long(layout.predictors, module)
    predicting = flat_hidden(module, tokens, positions, plan, blocks=blocks, rows=predictors)
    log_probs = _scored(module, predicting, head, labels, rows, guests or {})
    return outputs_of(layout, log_probs, module, values=_valued(predicting, rows, guests or {}))


def predicting_states(
    module: PreTrainedModel,
    layout: Layout,
    *,
    root: LearnedRoot | None = None,
    blocks: Blocks | None = None,
    by_mask: MaskedAttention | None = None,
    entry: Entry = PLAIN,
) -> Float[Tensor, "N d"]:
    """The final states from which the weighted tokens of a laid-out forest are predicted, by one flat pass."""
    ahead = 0 if root is None else root.token_count
    positions = long(layout.positions, module) + ahead + entry.first_position
    types = long(layout.types, module) if entry.types else None
    predictors = long(layout.predictors, module)
    if isinstance(root, LearnedPrompt) and any(span.both_ways for span in layout.spans):
        return _with_prompts(module, layout, root, types=types, entry=entry)
    plan = ForestPlan(spans=layout.spans, root=seen_root(module, root, blocks), by_mask=by_mask)
    tokens = long(layout.tokens, module)
    return flat_hidden(module, tokens, positions, plan, blocks=blocks, rows=predictors, types=types)


def _with_prompts(
    module: PreTrainedModel, layout: Layout, prompt: LearnedPrompt, *, types: Tensor | None, entry: Entry
) -> Float[Tensor, "N d"]:
    """The same where segments see both ways: a prompt then sees the text behind it, so each text has its own.

    Trees of one segment each, as encoders read them.
    """
    count = prompt.token_count
    embedded = module.get_input_embeddings()(long(layout.tokens, module))  # type: ignore[misc]
    learned = prompt.embeddings(embedded.dtype)
    parts, kinds, spans = [], [], []
    for index, span in enumerate(layout.spans):
        parts += [learned, embedded[span.start : span.stop]]
        if types is not None:
            kinds += [types.new_zeros(count), types[span.start : span.stop]]
        start = span.start + index * count
        spans.append(Span(start, start + count + span.length, (), span.both_ways))
    positions = torch.cat([torch.arange(span.length, device=module.device) for span in spans]) + entry.first_position
    rows = long(layout.predictors + count * (layout.trees + 1), module)
    plan = ForestPlan(spans=tuple(spans))
    flat_types = torch.cat(kinds) if kinds else None
    return flat_hidden(module, torch.cat(parts), positions, plan, rows=rows, types=flat_types)




def _seen_roots(
    module: PreTrainedModel, names: Sequence[str], guests: Mapping[str, Guest], blocks: Blocks | None
) -> dict[str, Root]:
    found = {name: seen_root(module, guests[name].root, blocks, adapter=name, mixes=mixes_of(guests)) for name in names}
    return {name: root for name, root in found.items() if root is not None}


def _scored(
    module: PreTrainedModel,
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


def _valued(
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


def seen_root(
    module: PreTrainedModel,
    root: LearnedRoot | None,
    blocks: Blocks | None,
    *,
    adapter: str = "",
    mixes: Mixes | None = None,
) -> Root | None:
    """A learned root as attention sees it. A prompt goes through the model for that, with its graph if there is one.

    `adapter` is whose it is, in a batch of several: no other changes how the model sees it. It may be one of `mixes`.
    """
    if root is None:
        return None
    if isinstance(root, LearnedKeysValues):
        return seen_keys_values(module, root)
    if not isinstance(root, LearnedPrompt):
        raise RecipeError(f"{type(root).__name__} is no kind of learned root", allowed="keys and values, or a prompt")
    captured: dict[int, tuple[Tensor, Tensor]] = {}
    count = root.token_count
    routes = whole(adapter, count, mixes or {}) if adapter else None
    nobody = whole(adapter, 0, mixes or {})
    plan = ForestPlan(spans=(Span(0, count, ()),), captured=captured, routes=routes, row_routes=nobody)
    places = torch.arange(root.token_count, device=module.device)
    # Nothing predicts from it: where our operations run the last block, it ends with these keys.
    flat_hidden(module, root.embeddings(module.dtype), places, plan, blocks=blocks, rows=places[:0])
    return Root(root.token_count, lambda layer, dtype: (captured[layer][0].to(dtype), captured[layer][1].to(dtype)))


def seen_keys_values(module: PreTrainedModel, root: LearnedRoot | None) -> Root | None:
    """A root of learned keys and values as attention sees it."""
    if not isinstance(root, LearnedKeysValues):
        return None
    learned = root.keys_values(module.dtype)
    return Root(root.token_count, lambda layer, dtype: _pair(learned[layer], dtype))


def _pair(both: Float[Tensor, "2 heads root size"], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return both[0].to(dtype)[None], both[1].to(dtype)[None]


def flat_hidden(
    module: PreTrainedModel,
    tokens: Int[Tensor, " T"] | Float[Tensor, "T e"],
    positions: Int[Tensor, " T"],
    plan: ForestPlan,
    *,
    blocks: Blocks | None = None,
    rows: Int[Tensor, " N"] | None = None,
    types: Int[Tensor, " T"] | None = None,
) -> Float[Tensor, "N d"]:
    """Final hidden states of a flat batch of token ids, or of their embeddings: those of `rows`, or all."""
    if blocks is not None:
        return blocks.hidden(tokens, positions, plan, rows)
    # A 4-D mask is handed through untouched by every mask function of the zoo: nothing of size T x T is ever built.
    untouched = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=tokens.device)
    body = module.base_model
    given = {"inputs_embeds" if tokens.is_floating_point() else "input_ids": tokens[None]}
    if types is not None:
        given["token_type_ids"] = types[None]
    with routed(body, plan.routes):
        result = body(
            **given,
            position_ids=positions[None],
            attention_mask=untouched,
            use_cache=False,
            forest_plan=plan,
        )
    if plan.calls == 0:
        raise UndrivableAttentionError(f"{type(body).__name__} does not call its attention by the interface")
    hidden: Tensor = result.last_hidden_state[0]
    return hidden if rows is None else hidden.index_select(0, rows)


def run_unrolled(
    module: PreTrainedModel,
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
    log_probs = _scored(module, predicting, head, long(unrolled.layout.labels, module), row_routes, guests or {})
    original = forest.layout
    worth = _valued(predicting, row_routes, guests or {}) if values is None else values.values(predicting)
    # Paths visit tokens in another order than the flat forest; objectives always see the forest's own.
    back = long(np.argsort(order, kind="stable"), module)
    ordered = None if worth is None else worth.index_select(0, back)
    return outputs_of(original, log_probs.index_select(0, back), module, values=ordered)


def unrolled_states(module: PreTrainedModel, forest: Forest) -> Float[Tensor, "N d"]:
    """The final states from which the weighted tokens of a forest are predicted, by every path as a row of its own."""
    _, predicting, order, _ = _unrolled(module, forest, {})
    return predicting.index_select(0, long(np.argsort(order, kind="stable"), module))


def _unrolled(
    module: PreTrainedModel, forest: Forest, mixes: Mixes
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


def score(
    module: PreTrainedModel, hidden: Float[Tensor, "N d"], head: AnyHead, labels: Int[Tensor, " N"]
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


def logits_of(module: PreTrainedModel, hidden: Float[Tensor, "n d"], head: AnyHead) -> Float[Tensor, "n V"]:
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
    module: PreTrainedModel,
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


def long(array: np.ndarray, module: PreTrainedModel) -> Int[Tensor, " n"]:
    """An array of whole numbers on the device of a model."""
    return torch.from_numpy(array.astype(np.int64, copy=False)).to(module.device)
