"""Causal attention of many separate texts that lie end to end, on a CPU.

Idea: each run of equal texts is one call of torch's flash attention, which reads its part of the flat queries, keys and
values where it lies and whose result is written to where it belongs: nothing is split, stacked or concatenated, in the
forward pass or in the backward pass.
Equation: out_i = sum_{j <= i} softmax_j(scale q_i k_j) v_j, within each text; a key head serves a group of query heads.
Source: flash attention, arXiv 2205.14135, as torch has it for CPUs.
Cost: 4 c q FLOPs a token forward and 10 c q backward, for c attended positions (half the length of a text) and q, heads
    times head size; q numbers and one for each head are kept.
Use when: texts share nothing and see all that is before them. Not when: there is a window, a soft cap or a common root.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

Run = tuple[int, int]
"""How many texts follow each other, and the length of each of them."""


def causal_attention(
    query: Float[Tensor, "n heads size"],
    key: Float[Tensor, "n groups size"],
    value: Float[Tensor, "n groups size"],
    runs: Sequence[Run],
    scale: float,
) -> Float[Tensor, "n heads size"]:
    """The attention of the texts that `runs` lays end to end."""
    attended: Tensor = _CausalAttention.apply(query, key, value, tuple(runs), scale)
    return attended


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, runs: tuple[Run, ...], scale: float) -> Tensor:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        sums = []
        for at, run in _places(runs):
            q, k, v = (_texts(tensor[at], run) for tensor in (query, key, value))
            attended, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, run[1] > 1, scale=scale
            )
            _texts(out[at], run).copy_(attended)
            sums.append(log_sum)
        ctx.runs, ctx.scale = runs, scale
        ctx.save_for_backward(query, key, value, out, *sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, out, *sums = ctx.saved_tensors
        given = (query, key, value)
        grads = [torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in given]
        for (at, run), log_sum in zip(_places(ctx.runs), sums, strict=True):
            dy, q, k, v, y = (_texts(tensor[at], run) for tensor in (grad, *given, out))
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                dy, q, k, v, y, log_sum, 0.0, run[1] > 1, scale=ctx.scale
            )
            for whole, part in zip(grads, found, strict=True):
                _texts(whole[at], run).copy_(part)
        return (*grads, None, None)


def _places(runs: tuple[Run, ...]) -> list[tuple[slice, Run]]:
    """Where each run lies, and the run."""
    places, start = [], 0
    for count, length in runs:
        places.append((slice(start, start + count * length), (count, length)))
        start += count * length
    return places


def _texts(flat: Float[Tensor, "n heads size"], run: Run) -> Float[Tensor, "count heads length size"]:
    """Texts of equal length as a batch; a view."""
    return flat.unflatten(0, run).transpose(1, 2)
