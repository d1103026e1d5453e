"""Attention of a whole forest in one call: FlexAttention with a block mask. For GPUs, where by segment is many calls.

Idea: by segment, every text or segment is a call of its own, and a GPU waits for each. Here the forest is one call over
all queries and all keys, and a mask says who sees whom. Blocks of 128 x 128 in which nobody sees anybody are left out,
blocks in which everybody sees everybody need no mask; both are found from the segments, without looking at pairs.
Equation: numbered as a walk through the trees comes to them, the segments below s are entered(s) to left(s) - 1. So
    q sees k  <=>  entered(k) <= entered(q) < left(k)  and  place(q) - window < place(k) <= reach(q),
    where a token has the numbers of its segment, and its place is how many keys come before it on its own path. It
    reaches its own place, or in a segment that sees both ways the last one there.
Source: FlexAttention, arXiv 2412.05496; pre-order intervals for ancestors, Dietz, STOC 1982.
Cost: attention's FLOPs over the blocks that are not left out; compiling, once for each model and precision.
Use when: on CUDA, for what flash attention does not take (kernels/varlen.py): windows, soft caps, float32, models whose
    blocks are the zoo's. Not when: on a CPU, where FlexAttention has no backward pass; or with dropout, which it lacks.
The mask and its blocks are tested on a CPU, the forward pass too; nothing of it has yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, final, no_type_check

import numpy as np
import torch
from jaxtyping import Float, Int32
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from luthier.data.forest import Span

BLOCK = 128
"""Queries and keys of a block; FlexAttention's own size."""
SMALLEST_HEAD = 16
"""Of a head of fewer numbers FlexAttention makes no kernel."""
SLOPE_TOLERANCE = 5e-2
"""Of the largest gradient; what rounding in bfloat16 explains."""


@dataclass(frozen=True)
class MaskedCall:
    """One call of attention by mask."""

    query: Float[Tensor, "1 H T D"]
    key: Float[Tensor, "1 h m D"]
    value: Float[Tensor, "1 h m D"]
    mask: BlockMask
    scale: float | None
    softcap: float | None


@final
class MaskedAttention:
    """FlexAttention as `attention` calls it: compiled, unless a test has its reasons. `calls` gets every call."""

    def __init__(self, attention: Callable[..., Any], calls: list[MaskedCall] | None = None) -> None:
        self._attention = attention
        self._calls = calls

    @classmethod
    def compiled(cls) -> MaskedAttention:
        """Compiled when it is first called, for all lengths at once.

        What cannot be compiled is an error: the alternative would hold the scores of all pairs, without a word.
        """
        return cls(torch.compile(flex_attention, dynamic=True, fullgraph=True))

    def noting(self, calls: list[MaskedCall]) -> MaskedAttention:
        """The same, putting down its calls."""
        return MaskedAttention(self._attention, calls)

    def takes(self, query: Float[Tensor, "1 H T D"], dropout: float) -> bool:
        """Whether queries like these can go this way."""
        return query.shape[0] == 1 and query.shape[-1] >= SMALLEST_HEAD and dropout == 0.0

    def attend(self, call: MaskedCall) -> Float[Tensor, "1 H T D"]:
        """The attended values of all queries; keys from outside come before those of the forest."""
        if self._calls is not None:
            self._calls.append(call)
        out: Tensor = self._attention(
            call.query, call.key, call.value, score_mod=None if call.softcap is None else _soft_cap(call.softcap),
            block_mask=call.mask, scale=call.scale, enable_gqa=call.query.shape[1] != call.key.shape[1],
        )  # fmt: skip
        return out

    def has_the_slopes_of(self, other: MaskedAttention, call: MaskedCall) -> bool:
        """Whether a call has the gradients that `other` finds, up to rounding in bfloat16."""
        slopes = []
        for attention in (self, other):
            given = [tensor.detach().requires_grad_() for tensor in (call.query, call.key, call.value)]
            with torch.enable_grad():
                out = attention.attend(replace(call, query=given[0], key=given[1], value=given[2]))
                # No even sum: the gradient of one in the keys is nought, whatever is attended to.
                slopes.append(torch.autograd.grad(out.float().square().sum(), given))
        pairs = zip(*slopes, strict=True)
        return all(bool((one - two).abs().max() <= SLOPE_TOLERANCE * two.abs().max()) for one, two in pairs)


def plain_attention(
    query: Float[Tensor, "1 H T D"],
    key: Float[Tensor, "1 h m D"],
    value: Float[Tensor, "1 h m D"],
    *,
    score_mod: Callable[..., Tensor] | None,
    block_mask: BlockMask,
    scale: float | None,
    enable_gqa: bool,
) -> Float[Tensor, "1 H T D"]:
    """The twin of FlexAttention, called as that is: all scores at once, in float32, with gradients on any device."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (side.float().repeat_interleave(repeats, 1) for side in (key, value))
    scores = query.float() @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    queries = torch.arange(query.shape[2], device=query.device)[:, None]
    keys = torch.arange(key.shape[2], device=query.device)[None, :]
    scores = scores if score_mod is None else score_mod(scores, 0, 0, queries, keys)
    hidden = ~block_mask.mask_mod(torch.zeros_like(keys), torch.zeros_like(keys), queries, keys)
    return (torch.softmax(scores.masked_fill(hidden, -torch.inf), -1) @ value).to(query.dtype)


def block_mask(spans: Sequence[Span], outside: int, window: int | None, device: torch.device) -> BlockMask:
    """Who sees whom in a forest after `outside` keys that every token sees, with a sliding window if there is one."""
    some, full = blocks(spans, outside, window)
    queries, keys = spans[-1].stop, outside + spans[-1].stop
    counts_some, order_some = _lists(some & ~full, device)
    counts_full, order_full = _lists(full, device)
    return BlockMask.from_kv_blocks(
        counts_some, order_some, counts_full, order_full, BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod(spans, outside, window, device), seq_lengths=(queries, keys),
    )  # fmt: skip


def mask_mod(
    spans: Sequence[Span], outside: int, window: int | None, device: torch.device
) -> Callable[..., Tensor]:
    """Whether a query sees a key, from the places of both; as FlexAttention wants it, for all batches and heads."""
    walk = _Walk.of(spans, outside)
    entered, left, place = (torch.from_numpy(each).to(device) for each in (walk.entered, walk.left, walk.place))
    # Tensors only, and always the same: a number that changes from batch to batch would be compiled anew.
    own, own_place = entered[outside:].clone(), place[outside:].clone()
    reach = torch.from_numpy(walk.reach).to(device)
    nearest = torch.zeros_like(own_place) if window is None else own_place - window + 1

    @no_type_check
    def sees(batch, head, query, key):
        below = (entered[key] <= own[query]) & (own[query] < left[key])
        return below & (place[key] <= reach[query]) & (place[key] >= nearest[query])

    return sees


@dataclass(frozen=True)
class _Walk:
    """Of every key, when a walk through the trees enters its segment and leaves the last one below, and its place; of
    every query, the place of the last key that it sees."""

    entered: np.ndarray
    left: np.ndarray
    place: np.ndarray
    reach: np.ndarray

    @classmethod
    def of(cls, spans: Sequence[Span], outside: int) -> _Walk:
        below = [1] * len(spans)
        for index in reversed(range(len(spans))):
            if spans[index].ancestors:
                below[spans[index].ancestors[-1]] += below[index]
        # Keys from outside are above all trees: 0 <= every number < len(spans).
        entered, left = [np.zeros(outside, np.int32)], [np.full(outside, len(spans), np.int32)]
        place = [np.arange(outside, dtype=np.int32)]
        reach = [np.zeros(0, np.int32)]
        first = [0] * len(spans)
        free, roots = [0] * len(spans), 0
        for index, span in enumerate(spans):
            parent = span.ancestors[-1] if span.ancestors else None
            if parent is None:
                first[index], roots = roots, roots + below[index]
            else:
                first[index], free[parent] = free[parent], free[parent] + below[index]
            free[index] = first[index] + 1
            entered.append(np.full(span.length, first[index], np.int32))
            left.append(np.full(span.length, first[index] + below[index], np.int32))
            depth = outside + sum(spans[ancestor].length for ancestor in span.ancestors)
            place.append(np.arange(depth, depth + span.length, dtype=np.int32))
            reach.append(np.full(span.length, place[-1][-1]) if span.both_ways else place[-1])
        return cls(*(np.concatenate(each) for each in (entered, left, place, reach)))


def blocks(spans: Sequence[Span], outside: int, window: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(blocks of queries, blocks of keys) twice: in which somebody sees somebody, and in which everybody everybody."""
    queries, keys = spans[-1].stop, outside + spans[-1].stop
    shape = (-(-queries // BLOCK), -(-keys // BLOCK))
    some, seen = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=np.int64)
    for row, count, place, both_ways, ranges in _pieces(spans, outside):
        for start, length, depth in ranges:
            # Of these keys, the first of which has the place `depth`, those that some query of the piece sees.
            nearest = 0 if window is None else max(0, place - window + 1 - depth)
            last = length if both_ways else min(length, place + count - depth)
            if nearest >= last:
                continue
            columns = np.arange((start + nearest) // BLOCK, (start + last - 1) // BLOCK + 1)
            some[row, columns] = True
            # Seen by all: up to the place of the first query, and near enough for the last.
            near = 0 if window is None else max(0, place + count - window - depth)
            common = length if both_ways else min(length, place + 1 - depth)
            low, high = columns * BLOCK, (columns + 1) * BLOCK
            here = np.minimum(high, start + common) - np.maximum(low, start + near)
            seen[row, columns] += count * np.maximum(here, 0)
    return some, seen == BLOCK * BLOCK


def _pieces(
    spans: Sequence[Span], outside: int
) -> Iterator[tuple[int, int, int, bool, list[tuple[int, int, int]]]]:
    """Each span cut where blocks of queries end: block, queries, place of the first, whether they see both ways, and
    the ranges of keys.

    A range is its first key, its length and the place of its first key.
    """
    for span in spans:
        depth = outside
        ranges = [(0, outside, 0)] if outside else []
        for index in span.ancestors:
            ranges.append((outside + spans[index].start, spans[index].length, depth))
            depth += spans[index].length
        ranges.append((outside + span.start, span.length, depth))
        first = span.start
        while first < span.stop:
            stop = min(span.stop, (first // BLOCK + 1) * BLOCK)
            yield first // BLOCK, stop - first, depth + first - span.start, span.both_ways, ranges
            first = stop


def _lists(
    wanted: np.ndarray, device: torch.device
) -> tuple[Int32[Tensor, "1 1 rows"], Int32[Tensor, "1 1 rows columns"]]:
    """How many blocks of each row are wanted, and all of its blocks with those in front."""
    counts = wanted.sum(1, dtype=np.int32)
    order = np.argsort(~wanted, axis=1, kind="stable").astype(np.int32)
    return torch.from_numpy(counts)[None, None].to(device), torch.from_numpy(order)[None, None].to(device)


def _soft_cap(cap: float) -> Callable[..., Tensor]:
    @no_type_check
    def bend(score, batch, head, query, key):
        return torch.tanh(score / cap) * cap

    return bend
