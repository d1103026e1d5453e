"""Attention of a forest's texts that lie end to end, by the flash attention that comes with torch for CUDA.

Idea: torch's operation takes the places at which queries and keys of each text begin, so that all of a batch is one
call whatever its lengths; `torch.nn.attention.varlen` is the same operation inside. Called one level lower, it gives
the log-sums to whoever keeps them, and the backward pass is ours to call. A text that sees others gets a copy of their
keys before its own, for the length of the call: with more keys than queries the causal mask ends at the lower right
corner, which is what a text after its ancestors sees.
Source: FlashAttention-2, arXiv 2307.08691; the corner: its release 2.1, and torch.nn.attention.bias.causal_lower_right.
Cost: that of kernels/causal.py; where texts see others, a copy of all keys that each of them sees. Sums over texts and
    in the backward pass are in an order that changes from run to run, unless torch is told to be deterministic.
Use when: bfloat16 or float16 on a GPU of compute capability 8.0 or later, heads of at most 192 numbers, in steps of 8.
Not when: anything else; attention then goes text by text through scaled_dot_product_attention
    (model/attending/attention.py).
Written against the signatures of torch 2.13; not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor

from luthier.kernels.backend import Run, Seen

LARGEST_HEAD = 192
"""Of a head of 256 numbers only the largest chips can compute the gradient."""
FIRST_CAPABILITY = (8, 0)


def allowed(query: Float[Tensor, "n heads size"]) -> bool:
    """Whether the operation is there for queries like this one, its backward pass included."""
    return (
        query.device.type == "cuda"
        and fits(query)
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(query.device) >= FIRST_CAPABILITY
    )


def fits(query: Float[Tensor, "n heads size"]) -> bool:
    """Whether precision and head size are such that the operation takes them."""
    size = query.shape[-1]
    return query.dtype in (torch.bfloat16, torch.float16) and size % 8 == 0 and 0 < size <= LARGEST_HEAD


@dataclass(frozen=True)
class Places:
    """Where the queries and the keys of each text begin and end, how many it has at most, and which rows its keys are.

    `rows` is None where keys lie as queries do.
    """

    queries: Int32[Tensor, " ends"]
    keys: Int32[Tensor, " ends"]
    longest_queries: int
    longest_keys: int
    rows: Int[Tensor, " picked"] | None


@final
class Finder:
    """Finds the places, and keeps the last: they are the same for all layers of a pass, and made on the CPU."""

    def __init__(self) -> None:
        self._last: tuple[tuple[tuple[Run, ...], Seen | None, torch.device], Places] | None = None

    def places(self, runs: Sequence[Run], seen: Seen | None, device: torch.device) -> Places:
        """Where the texts of `runs`, and what they see, begin and end."""
        if seen is not None and seen.starts is not None:
            longest = sum(count * length for count, length in runs)
            return Places(seen.starts, seen.starts, longest, longest, None)
        asked, last = (tuple(runs), seen, device), self._last
        if last is None or last[0] != asked:
            last = (asked, find_places(runs, seen, device))
            self._last = last
        return last[1]


def find_places(runs: Sequence[Run], seen: Seen | None, device: torch.device) -> Places:
    """The places, from nothing."""
    lengths = [length for count, length in runs for _ in range(count)]
    queries = _starts(lengths, device)
    if seen is None:
        return Places(queries, queries, max(lengths), max(lengths), None)
    parts, start, counts = [], seen.outside, []
    for length, ranges in zip(lengths, seen.ranges, strict=True):
        own = [*ranges, (start, length)]
        parts += [torch.arange(first, first + count) for first, count in own]
        counts.append(sum(count for _, count in own))
        start += length
    rows = torch.cat(parts).to(device, non_blocking=True)
    return Places(queries, _starts(counts, device), max(lengths), max(counts), rows)


def attend(
    query: Float[Tensor, "n heads size"],
    key: Float[Tensor, "m groups size"],
    value: Float[Tensor, "m groups size"],
    places: Places,
    scale: float,
) -> tuple[Float[Tensor, "n heads size"], Float[Tensor, "heads n"]]:
    """The attended values and the log-sums."""
    return _forward(query, _picked(key, places), _picked(value, places), places, scale)


def attend_backward(
    grad: Float[Tensor, "n heads size"],
    query: Float[Tensor, "n heads size"],
    key: Float[Tensor, "m groups size"],
    value: Float[Tensor, "m groups size"],
    out: Float[Tensor, "n heads size"],
    log_sums: Float[Tensor, "heads n"],
    places: Places,
    scale: float,
) -> tuple[Float[Tensor, "n heads size"], Float[Tensor, "m groups size"], Float[Tensor, "m groups size"]]:
    """The gradients of query, key and value."""
    given = (query, _picked(key, places), _picked(value, places))
    grad_query, *sides = _backward(grad, *given, out, log_sums, places, scale)
    grad_key, grad_value = (_put_back(side, places, len(key)) for side in sides)
    return grad_query, grad_key, grad_value


def _starts(lengths: Sequence[int], device: torch.device) -> Int32[Tensor, " ends"]:
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return ends.to(device, non_blocking=True)


def _picked(side: Float[Tensor, "m groups size"], places: Places) -> Float[Tensor, "picked groups size"]:
    """Keys or values as the texts see them, end to end."""
    return side if places.rows is None else side.index_select(0, places.rows)


def _put_back(
    grad: Float[Tensor, "picked groups size"], places: Places, count: int
) -> Float[Tensor, "m groups size"]:
    """The gradient of each row: the sum over all texts that saw it, in float32 because those may be many."""
    if places.rows is None:
        return grad
    total = torch.zeros(count, *grad.shape[1:], dtype=torch.float32, device=grad.device)
    return total.index_add_(0, places.rows, grad.float()).to(grad.dtype)


def _forward(
    query: Float[Tensor, "n heads size"],
    key: Float[Tensor, "picked groups size"],
    value: Float[Tensor, "picked groups size"],
    places: Places,
    scale: float,
) -> tuple[Float[Tensor, "n heads size"], Float[Tensor, "heads n"]]:
    """Torch's operation: with fewer queries than keys, the last query sees all keys."""
    out, log_sums, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, places.queries, places.keys, places.longest_queries, places.longest_keys, 0.0, True, False,
        scale=scale,
    )  # fmt: skip
    return out, log_sums


def _backward(
    grad: Float[Tensor, "n heads size"],
    query: Float[Tensor, "n heads size"],
    key: Float[Tensor, "picked groups size"],
    value: Float[Tensor, "picked groups size"],
    out: Float[Tensor, "n heads size"],
    log_sums: Float[Tensor, "heads n"],
    places: Places,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    # The state of the random generator is of no use without dropout; torch's own varlen attention passes zeros too.
    unused_state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    nothing = torch.empty(0, device=query.device)
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
        grad, query, key, value, out, log_sums, places.queries, places.keys, places.longest_queries,
        places.longest_keys, 0.0, True, unused_state, nothing, scale=scale,
    )  # fmt: skip
    return grads
