"""Causal attention of many separate texts that lie end to end.

Idea: no text sees another, so nothing is padded and no mask exists; the backend works through the texts where they lie.
Equation: out_i = sum_{j <= i} softmax_j(scale q_i k_j) v_j, within each text; a key head serves a group of query heads.
Source: flash attention, arXiv 2205.14135.
Cost: 4 c q FLOPs a token forward and 10 c q backward, for c attended positions (half the length of a text) and q, heads
    times head size; q numbers and one for each head are kept.
Use when: texts share nothing and see all that is before them. Not when: there is a window, a soft cap or a common root.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from luthier.kernels.backend import Backend, Run


def causal_attention(
    query: Float[Tensor, "n heads size"],
    key: Float[Tensor, "n groups size"],
    value: Float[Tensor, "n groups size"],
    runs: Sequence[Run],
    scale: float,
    backend: Backend,
) -> Float[Tensor, "n heads size"]:
    """The attention of the texts that `runs` lays end to end."""
    attended: Tensor = _CausalAttention.apply(query, key, value, tuple(runs), scale, backend)
    return attended


class _CausalAttention(Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, runs: tuple[Run, ...], scale: float, backend: Backend
    ) -> Tensor:
        out, kept = backend.attend(query, key, value, runs, scale)
        ctx.settings = runs, scale, backend
        ctx.save_for_backward(query, key, value, out, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, out, *kept = ctx.saved_tensors
        runs, scale, backend = ctx.settings
        found: tuple[Tensor, ...] = backend.attend_backward(
            grad.contiguous(), query, key, value, out, kept, runs, scale
        )
        return (*found, None, None, None)
