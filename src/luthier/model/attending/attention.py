"""Attention over segments: how a flat forest goes through the zoo's own attention modules.

Idea: transformers lets a model call a registered attention function. Ours receives the queries, keys and values of the
whole flat batch and a `ForestPlan`, and makes one call for each segment over its ancestors' keys and its own; nothing
is padded and no dense mask over the batch exists. On a GPU all of them may be one call (block_mask.py). Without a plan
(padded generation, plain forwards) it is the zoo's own SDPA. The mask function is registered with it: without one,
transformers hands padded batches no mask at all. A segment that sees both ways is attended without a mask; a decoder
that reads an encoder's states finds in the plan's `memory` which of them each of its segments reads.
Source: transformers' AttentionInterface; flash attention on the CPU needs `is_causal` or no mask to skip blocks, which
is why a segment without ancestors takes the causal call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from luthier.core.errors import UndrivableAttentionError
from luthier.data.forest import Span
from luthier.kernels.backend import Seen
from luthier.model.attending.block_mask import BlockMask, MaskedAttention, MaskedCall, block_mask
from luthier.model.attending.kept import AttentionCall, KeptKeys
from luthier.model.attending.relative_bias import RelativeBias
from luthier.model.routes import Routes

NAME = "luthier_forest"
"""The attention implementation the model's config names."""

_UNSUPPORTED = ("s_aux", "alibi", "score_mod", "block_mask")


@dataclass(frozen=True)
class Unit:
    """`count` neighbouring spans of `length` tokens each, the first of which is span `first`."""

    first: int
    count: int
    length: int


@dataclass(frozen=True)
class Root:
    """A learned root as attention sees it: how many keys it has, and those of a layer, (1, h, A, D) in a precision.

    Where it is the roots of several adapters side by side, `seen_by` says for each span which keys are its own: the
    first one and how many.
    """

    token_count: int
    keys_values: Callable[[int, torch.dtype], tuple[Tensor, Tensor]]
    seen_by: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True)
class Memory:
    """What a decoder reads of an encoder: for each of its spans the encoder's, and the modules that do the reading."""

    spans: Sequence[Span]
    readers: frozenset[nn.Module]


@dataclass
class ForestPlan:
    """What the attention function needs of a forest: spans, learned roots, and keys and values from outside.

    `outer` holds, for each layer, keys and values (1, h, A, D) that every span sees before its own ancestors (a parent
    that went through the model in another pass). `captured` collects each layer's keys and values when it is a dict.
    `by_mask` makes one call of the attention of many segments, where it is given. `memory` is for decoders that read
    the states of an encoder. `routes` say which tokens belong to which adapter, where several are in one batch, and
    `row_routes` the same of the rows that are asked for. `kept` attends instead of everything else, where texts grow.
    """

    spans: Sequence[Span]
    root: Root | None = None
    outer: dict[int, tuple[Tensor, Tensor]] | None = None
    captured: dict[int, tuple[Tensor, Tensor]] | None = None
    noted: dict[int, AttentionCall] = field(default_factory=dict)
    calls: int = 0
    masks: _Masks = field(default_factory=lambda: _Masks())
    by_mask: MaskedAttention | None = None
    memory: Memory | None = None
    routes: Routes | None = None
    row_routes: Routes | None = None
    kept: KeptKeys | None = None

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """The spans as they are attended: runs of roots of equal length go together, everything else alone."""
        return _units(self.spans, alone=self.root is not None or self.outer is not None)

    @cached_property
    def outside(self) -> int:
        """Keys that every span sees before all others: those of a learned root and those from another pass."""
        outer = 0 if self.outer is None else next(iter(self.outer.values()))[0].shape[2]
        return outer + (0 if self.root is None else self.root.token_count)

    @cached_property
    def seen(self) -> Seen | None:
        """What each span sees before its own tokens; None when no span sees anything."""
        own = None if self.root is None else self.root.seen_by
        common = [(0, self.outside)] * len(self.spans) if own is None else own
        ranges = tuple(
            (
                *([outer] if outer[1] else []),
                *((self.outside + self.spans[a].start, self.spans[a].length) for a in span.ancestors),
            )
            for outer, span in zip(common, self.spans, strict=True)
        )
        return Seen(ranges, self.outside) if any(ranges) else None

    @cached_property
    def longest(self) -> int:
        """The most keys that a token sees, itself included."""
        own = (span.length + sum(self.spans[a].length for a in span.ancestors) for span in self.spans)
        return self.outside + max(own, default=0)

    def outer_keys(self, layer: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (1, h, A, D) of one layer that every span sees before all others, in their order."""
        pairs = [] if self.root is None else [self.root.keys_values(layer, dtype)]
        return pairs if self.outer is None else [*pairs, self.outer[layer]]

    @property
    def ahead(self) -> list[int]:
        """For each span how many keys of a learned root are before it."""
        if self.root is None or self.root.seen_by is None:
            return [0 if self.root is None else self.root.token_count] * len(self.spans)
        return [count for _, count in self.root.seen_by]

    @cached_property
    def both_ways(self) -> bool:
        """Whether any segment sees both ways."""
        return any(span.both_ways for span in self.spans)

    def own_outer(self, span: int, outer: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """What one span sees of `outer_keys`: of several roots its own."""
        if self.root is None or self.root.seen_by is None:
            return outer
        first, count = self.root.seen_by[span]
        return [(key.narrow(2, first, count), value.narrow(2, first, count)) for key, value in outer] if count else []

    def mask(
        self, before: int, own: int, window: int | None, device: torch.device, *, both_ways: bool = False
    ) -> Bool[Tensor, "own all"]:
        """Which of `before + own` keys each of the `own` last queries sees, with a sliding window if there is one."""
        key = (before, own, window, both_ways)
        if key not in self.masks.dense:
            queries = torch.arange(before, before + own, device=device)[:, None]
            keys = torch.arange(before + own, device=device)[None, :]
            last = queries if not both_ways else before + own - 1 if window is None else queries + window - 1
            visible = keys <= last
            self.masks.dense[key] = visible if window is None else visible & (keys > queries - window)
        return self.masks.dense[key]

    def block_mask(self, window: int | None, device: torch.device) -> BlockMask:
        """Which of all keys, those from outside first, each of all queries sees."""
        if window is not None and self.longest <= window:
            window = None
        if window not in self.masks.blocks:
            self.masks.blocks[window] = block_mask(self.spans, self.outside, window, device)
        return self.masks.blocks[window]


@dataclass
class _Masks:
    """Masks that a plan has made, as layers ask for the same ones."""

    dense: dict[tuple[int, int, int | None, bool], Tensor] = field(default_factory=dict)
    blocks: dict[int | None, BlockMask] = field(default_factory=dict)


def _units(spans: Sequence[Span], *, alone: bool) -> tuple[Unit, ...]:
    parents = {ancestor for span in spans for ancestor in span.ancestors}
    units: list[Unit] = []
    joins = False
    for index, span in enumerate(spans):
        plain = not alone and not span.ancestors and index not in parents
        if plain and joins and units[-1].length == span.length and spans[units[-1].first].both_ways == span.both_ways:
            units[-1] = Unit(units[-1].first, units[-1].count + 1, span.length)
        else:
            units.append(Unit(index, 1, span.length))
        joins = plain
    return tuple(units)


def register() -> None:
    """Make the attention function and its mask function known to transformers. Repeating it changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, forest_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def forest_attention(
    module: nn.Module,
    query: Float[Tensor, "B H T D"],
    key: Float[Tensor, "B h S D"],
    value: Float[Tensor, "B h S D"],
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    forest_plan: ForestPlan | None = None,
    position_bias: Tensor | RelativeBias | None = None,
    **zoo: object,
) -> tuple[Float[Tensor, "B T H D"], None]:
    """The attention function of the interface; the open keywords are transformers' own calling convention.

    Raises UndrivableAttentionError when the model passes parts (sinks, position biases) that it does not know.
    """
    reads = forest_plan is not None and forest_plan.memory is not None and module in forest_plan.memory.readers
    unknown = [name for name in _UNSUPPORTED if zoo.get(name) is not None]
    if forest_plan is not None and isinstance(position_bias, Tensor) and not reads:
        unknown.append("position_bias")
    if unknown:
        raise UndrivableAttentionError(f"{type(module).__name__} passes {', '.join(unknown)} to its attention")
    if forest_plan is None:
        if softcap is not None:
            return _plain_soft_capped(query, key, value, attention_mask, scaling, softcap, dropout), None
        if position_bias is not None:
            zoo["position_bias"] = position_bias
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **zoo
        )
    if reads:
        return _read(forest_plan, query, key, value, scaling, dropout), None
    # Some modules of the zoo do not know which layer they are; they are called in the order of layers.
    layer = int(getattr(module, "layer_idx", forest_plan.calls))
    forest_plan.calls += 1
    forest_plan.noted[layer] = way = AttentionCall(scaling, sliding_window, softcap)
    if forest_plan.kept is not None:
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        return forest_plan.kept.attend(layer, q, k, v, way)[None], None
    if forest_plan.captured is not None:
        forest_plan.captured[layer] = (key, value)
    outer = forest_plan.outer_keys(layer, key.dtype)
    bias = position_bias if isinstance(position_bias, RelativeBias) else None
    by_mask = forest_plan.by_mask
    # Of several roots each tree sees its own, which no block mask says: that is done by segment.
    apart = forest_plan.root is not None and forest_plan.root.seen_by is not None
    odd = apart or bias is not None or (forest_plan.both_ways and sliding_window is not None)
    if by_mask is not None and len(forest_plan.units) > 1 and not odd and by_mask.takes(query, dropout):
        key, value = (torch.cat([*(pair[side] for pair in outer), own], 2) for side, own in enumerate((key, value)))
        mask = forest_plan.block_mask(sliding_window, query.device)
        attended = by_mask.attend(MaskedCall(query, key, value, mask, scaling, softcap))
        return attended.transpose(1, 2).contiguous(), None
    call = _Call(forest_plan, scaling, sliding_window, softcap, dropout, bias)
    return _by_segment(query, key, value, outer, call), None


@dataclass(frozen=True)
class _Call:
    """A call of attention by segment: what is the same for all segments."""

    plan: ForestPlan
    scaling: float | None
    window: int | None
    softcap: float | None
    dropout: float
    bias: RelativeBias | None


def _by_segment(
    query: Float[Tensor, "1 H T D"],
    key: Float[Tensor, "1 h T D"],
    value: Float[Tensor, "1 h T D"],
    outer: list[tuple[Tensor, Tensor]],
    call: _Call,
) -> Float[Tensor, "1 T H D"]:
    """One call for each unit, over what it sees from outside, its ancestors' keys and its own."""
    plan = call.plan
    # split, not slicing: its backward is one concatenation, where each slice would allocate a full-size zero gradient.
    sizes = [unit.count * unit.length for unit in plan.units]
    queries, keys, values = (tensor.split(sizes, dim=2) for tensor in (query, key, value))
    place = {unit.first: index for index, unit in enumerate(plan.units)}
    outputs = []
    for index, unit in enumerate(plan.units):
        span, seen = plan.spans[unit.first], plan.own_outer(unit.first, outer)
        ancestors = [place[ancestor] for ancestor in span.ancestors]
        before_k = [*(pair[0] for pair in seen), *(keys[a] for a in ancestors)]
        before_v = [*(pair[1] for pair in seen), *(values[a] for a in ancestors)]
        q, k, v = (_side_by_side(parts[index], unit) for parts in (queries, keys, values))
        seen_k = torch.cat([*before_k, k], dim=2) if before_k else k
        seen_v = torch.cat([*before_v, v], dim=2) if before_v else v
        attended = _attend(q, seen_k, seen_v, call, both_ways=span.both_ways)
        outputs.append(attended.transpose(1, 2).reshape(1, unit.count * unit.length, *attended.shape[1::2]))
    return torch.cat(outputs, dim=1)


def _read(
    plan: ForestPlan,
    query: Float[Tensor, "1 H T D"],
    key: Float[Tensor, "1 h S D"],
    value: Float[Tensor, "1 h S D"],
    scaling: float | None,
    dropout: float,
) -> Float[Tensor, "1 T H D"]:
    """Attention of each of a decoder's spans over all states of the span that it reads."""
    if plan.memory is None:
        raise UndrivableAttentionError("a decoder reads an encoder", allowed="a plan that names what it reads")
    queries = query.split([span.length for span in plan.spans], dim=2)
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    for own, read in zip(queries, plan.memory.spans, strict=True):
        k, v = (side[:, :, read.start : read.stop] for side in (key, value))
        outputs.append(
            F.scaled_dot_product_attention(own, k, v, scale=scaling, dropout_p=dropout, enable_gqa=grouped)
        )
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _side_by_side(flat: Float[Tensor, "1 H n D"], unit: Unit) -> Float[Tensor, "count H length D"]:
    """Equal spans that lie end to end, as the rows of a batch; a view."""
    return flat if unit.count == 1 else flat[0].unflatten(1, (unit.count, unit.length)).transpose(0, 1)


def _attend(
    query: Float[Tensor, "B H n D"],
    key: Float[Tensor, "B h m D"],
    value: Float[Tensor, "B h m D"],
    call: _Call,
    *,
    both_ways: bool,
) -> Float[Tensor, "B H n D"]:
    """Attention of the last n positions of a path over all m positions of it."""
    own, total = query.shape[2], key.shape[2]
    window = None if call.window is not None and total <= call.window else call.window
    mask: Tensor | None = None
    causal = own > 1 and own == total and not both_ways
    if window is not None or not both_ways:
        mask = call.plan.mask(total - own, own, window, query.device, both_ways=both_ways)
    if call.softcap is not None:
        seen = torch.ones(own, total, dtype=torch.bool, device=query.device) if mask is None else mask
        return soft_capped(query, key, value, seen, call.scaling, call.softcap, call.dropout)
    if call.bias is not None:
        added = call.bias.between(total - own, own).to(query.dtype)
        mask = added if mask is None else added.masked_fill(~mask, -torch.inf)
    elif window is None and own == total:
        mask = None
    if query.is_meta and not call.dropout and (mask is None or not mask.requires_grad):
        # Without memory torch takes its slowest way, which keeps n x n numbers; where there is some, this one.
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.empty_like(mask, dtype=query.dtype)
        made = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal and mask is None, attn_mask=mask, scale=call.scaling
        )
        return cast(Tensor, made[0])
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal and mask is None, scale=call.scaling,
        dropout_p=call.dropout, enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip


def soft_capped(
    query: Float[Tensor, "B H n D"],
    key: Float[Tensor, "B h m D"],
    value: Float[Tensor, "B h m D"],
    mask: Bool[Tensor, "n m"] | Tensor,
    scaling: float | None,
    softcap: float,
    dropout: float,
) -> Float[Tensor, "B H n D"]:
    """Attention with logits cap tanh(logits / cap), as Gemma 2 has it; SDPA has no such term."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    logits = torch.tanh(query @ key.transpose(2, 3) * scale / softcap) * softcap
    # The smallest finite number, not -inf: padding rows of a batch may see nothing at all, and must not become NaN.
    smallest = torch.finfo(logits.dtype).min
    logits = logits.masked_fill(~mask, smallest) if mask.dtype == torch.bool else logits + mask
    # float32: the softmax of the zoo's eager path is in float32 too.
    weights = F.dropout(torch.softmax(logits, -1, dtype=torch.float32).to(query.dtype), dropout)
    return weights @ value


def _plain_soft_capped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float,
    dropout: float,
) -> Float[Tensor, "B T H D"]:
    own, total = query.shape[2], key.shape[2]
    if mask is None:
        mask = torch.ones(own, total, dtype=torch.bool, device=query.device).tril(total - own)
    return soft_capped(query, key, value, mask, scaling, softcap, dropout).transpose(1, 2).contiguous()
