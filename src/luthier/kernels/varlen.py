"""Causal attention of texts that lie end to end, by the flash attention that comes with torch for CUDA.

Idea: torch's operation takes the places at which texts begin, so that all of a batch is one call whatever its lengths;
`torch.nn.attention.varlen` is the same operation inside. Called one level lower, it gives the log-sums to whoever keeps
them, and the backward pass is ours to call.
Source: FlashAttention-2, arXiv 2307.08691.
Cost: that of kernels/causal.py. The backward pass adds up gradients of queries in an order that changes from run to
    run, unless torch is told to be deterministic.
Use when: bfloat16 or float16 on a GPU of compute capability 8.0 or later, heads of at most 192 numbers, in steps of 8.
Not when: anything else; attention then goes text by text through scaled_dot_product_attention (model/attention.py).
Written against the signatures of torch 2.13; not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from luthier.kernels.backend import Run

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


def attend(
    query: Float[Tensor, "n heads size"],
    key: Float[Tensor, "n groups size"],
    value: Float[Tensor, "n groups size"],
    runs: Sequence[Run],
    scale: float,
) -> tuple[Float[Tensor, "n heads size"], tuple[Tensor, ...]]:
    """The attended values; and the log-sums, (heads, n), with the places where texts begin."""
    starts, longest = _starts(runs, query.device), max(length for _, length in runs)
    out, log_sums, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, starts, starts, longest, longest, 0.0, True, False, scale=scale
    )
    return out, (log_sums, starts)


def attend_backward(
    grad: Float[Tensor, "n heads size"],
    query: Float[Tensor, "n heads size"],
    key: Float[Tensor, "n groups size"],
    value: Float[Tensor, "n groups size"],
    out: Float[Tensor, "n heads size"],
    kept: Sequence[Tensor],
    runs: Sequence[Run],
    scale: float,
) -> tuple[Float[Tensor, "n heads size"], Float[Tensor, "n groups size"], Float[Tensor, "n groups size"]]:
    """The gradients of query, key and value."""
    log_sums, starts = kept
    longest = max(length for _, length in runs)
    # The state of the random generator is of no use without dropout; torch's own varlen attention passes zeros too.
    unused_state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    nothing = torch.empty(0, device=query.device)
    grad_query, grad_key, grad_value = torch.ops.aten._flash_attention_backward(
        grad, query, key, value, out, log_sums, starts, starts, longest, longest, 0.0, True, unused_state, nothing,
        scale=scale,
    )  # fmt: skip
    return grad_query, grad_key, grad_value


def _starts(runs: Sequence[Run], device: torch.device) -> Int32[Tensor, " ends"]:
    """Where each text begins, and where the last one ends."""
    lengths = torch.tensor([0, *(length for count, length in runs for _ in range(count))], dtype=torch.int32)
    return lengths.cumsum(0, dtype=torch.int32).to(device, non_blocking=True)
