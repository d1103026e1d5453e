"""The executor: a forest through a model in one flat pass, and which way of running it a model takes.

By segment: one flat pass over all tokens; attention sees a `ForestPlan` (see attention.py), everything else works token
by token anyway. By mask: the same pass, on a GPU, with attention as one call (see block_mask.py). The other way, of
unrolled paths, gives the same losses and gradients (see unrolled.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from luthier.core.errors import RecipeError, UndrivableAttentionError
from luthier.data.forest import Forest, Ints, Layout, Span
from luthier.kernels.backend import Backend
from luthier.kernels.head import Head
from luthier.model.attending.attention import ForestPlan, Root
from luthier.model.attending.block_mask import MaskedAttention
from luthier.model.editing.edits import LearnedKeysValues, LearnedPrompt, LearnedRoot, routed
from luthier.model.editing.value_head import ValueHead
from luthier.model.packed import packing_of
from luthier.model.routes import Mixes, predicted_routes, routes_of, whole
from luthier.model.running.blocks import Blocks
from luthier.model.running.guests import Guest, first_positions, mixes_of, side_by_side
from luthier.model.running.outputs import TokenOutputs
from luthier.model.running.own_lengths import short_length, span_lengths, token_lengths, turned
from luthier.model.running.scoring import AnyHead, long, outputs_of, score, scored, valued
from luthier.model.zoo import ZooModule


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

    def keeps_rows_apart(self, head: AnyHead, sites: Sequence[str], *, named: bool) -> bool:
        """Whether a row, with low-rank terms at these sites, is the same to the bit in every pass without gradients of
        no more rows than the backend's `few`, which `named` their adapters."""
        if not self.backend.few or self.blocks is None or not isinstance(head, Head) or head.changes:
            return False
        packing = packing_of(head.weight)
        return (packing is None or packing.rows_apart) and self.blocks.keep_rows_apart(sites, named=named)


def run_segments(
    module: ZooModule,
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
    known = guests or {}
    own_roots = {name: known[name].root for name in routes.names}
    names = [tree.adapter for tree in forest.trees for _ in tree.segments]

    def seen(name: str, places: int) -> Root | None:
        return seen_root(module, own_roots[name], blocks, adapter=name, mixes=mixes, places=places)

    root_seen = _seen_by_each(module, layout.spans, [own_roots[name] for name in names], names, seen)
    rows = predicted_routes(forest, mixes)
    plan = ForestPlan(spans=layout.spans, by_mask=by_mask, routes=routes, row_routes=rows, root=root_seen)
    positions = long(layout.positions, module) + long(first_positions(forest, own_roots), module)
    tokens, predictors = long(layout.tokens, module), long(layout.predictors, module)
    predicting = flat_hidden(module, tokens, positions, plan, blocks=blocks, rows=predictors)
    log_probs = scored(module, predicting, head, labels, rows, known)
    return outputs_of(layout, log_probs, module, values=valued(predicting, rows, known))


def predicting_states(
    module: ZooModule,
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

    def seen(name: str, places: int) -> Root | None:
        return seen_root(module, root, blocks, places=places)

    spans = layout.spans
    root_seen = _seen_by_each(module, spans, [root] * len(spans), [""] * len(spans), seen)
    plan = ForestPlan(spans=spans, root=root_seen, by_mask=by_mask)
    tokens = long(layout.tokens, module)
    return flat_hidden(module, tokens, positions, plan, blocks=blocks, rows=predictors, types=types)


def _with_prompts(
    module: ZooModule, layout: Layout, prompt: LearnedPrompt, *, types: Tensor | None, entry: Entry
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


def _seen_by_each(
    module: ZooModule,
    spans: Sequence[Span],
    roots: Sequence[LearnedRoot | None],
    names: Sequence[str],
    seen: Callable[[str, int], Root | None],
) -> Root | None:
    """What the spans of a batch see of their learned roots, which go by a name and by how long their texts are."""
    limit = short_length(module.base_model) or sys.maxsize
    lengths = span_lengths(spans, [0 if root is None else root.token_count for root in roots])
    # Keys that were learned as they are have no angles.
    kinds = [
        (name, isinstance(root, LearnedPrompt) and length > limit)
        for name, root, length in zip(names, roots, lengths, strict=True)
    ]
    places = dict(zip(kinds, lengths, strict=True))
    made = {kind: seen(kind[0], length) for kind, length in places.items()}
    found = {kind: root for kind, root in made.items() if root is not None}
    return next(iter(found.values()), None) if len(made) == 1 else side_by_side(found, kinds)


def seen_root(
    module: ZooModule,
    root: LearnedRoot | None,
    blocks: Blocks | None,
    *,
    adapter: str = "",
    mixes: Mixes | None = None,
    places: int = 0,
) -> Root | None:
    """A learned root as attention sees it. A prompt goes through the model for that, with its graph if there is one.

    `adapter` is whose it is, in a batch of several: no other changes how the model sees it. It may be one of `mixes`.
    The texts behind it have so many `places`, its own among them.
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
    at = torch.arange(count, device=module.device)
    lengths = np.full(count, max(count, places), np.int32)
    # Nothing predicts from it: where our operations run the last block, it ends with these keys.
    flat_hidden(module, root.embeddings(module.dtype), at, plan, blocks=blocks, rows=at[:0], lengths=lengths)
    return Root(root.token_count, lambda layer, dtype: (captured[layer][0].to(dtype), captured[layer][1].to(dtype)))


def seen_keys_values(module: ZooModule, root: LearnedRoot | None) -> Root | None:
    """A root of learned keys and values as attention sees it."""
    if not isinstance(root, LearnedKeysValues):
        return None
    learned = root.keys_values(module.dtype)
    return Root(root.token_count, lambda layer, dtype: _pair(learned[layer], dtype))


def _pair(both: Float[Tensor, "2 heads root size"], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return both[0].to(dtype)[None], both[1].to(dtype)[None]


def flat_hidden(
    module: ZooModule,
    tokens: Int[Tensor, " T"] | Float[Tensor, "T e"],
    positions: Int[Tensor, " T"],
    plan: ForestPlan,
    *,
    blocks: Blocks | None = None,
    rows: Int[Tensor, " N"] | None = None,
    types: Int[Tensor, " T"] | None = None,
    lengths: Ints | None = None,
) -> Float[Tensor, "N d"]:
    """Final hidden states of a flat batch of token ids, or of their embeddings: those of `rows`, or all.

    `lengths` (T,) are how many places the text of each token has, where the plan does not show all of it.
    """
    body = module.base_model
    with turned(body, lambda: token_lengths(plan.spans, plan.ahead) if lengths is None else lengths):
        if blocks is not None:
            return blocks.hidden(tokens, positions, plan, rows)
        return _zoo_hidden(body, tokens, positions, plan, rows=rows, types=types)


def _zoo_hidden(
    body: nn.Module,
    tokens: Int[Tensor, " T"] | Float[Tensor, "T e"],
    positions: Int[Tensor, " T"],
    plan: ForestPlan,
    *,
    rows: Int[Tensor, " N"] | None,
    types: Int[Tensor, " T"] | None,
) -> Float[Tensor, "N d"]:
    """The same by the zoo's own modules, one after another."""
    # A 4-D mask is handed through untouched by every mask function of the zoo: nothing of size T x T is ever built.
    untouched = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=tokens.device)
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
