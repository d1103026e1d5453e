"""Causal attention of many texts that lie end to end, each of which may see others before itself.

Idea: a text sees all it descends from and its own tokens up to each one, so nothing is padded and no mask exists; the
backend works through the texts where they lie.
Equation: out_i = sum_j softmax_j(scale q_i k_j) v_j over the keys before a text and those of its tokens j <= i; a key
    head serves a group of query heads.
Source: flash attention, arXiv 2205.14135.
Cost: 4 c q FLOPs a token forward and 10 c q backward, for c attended positions (half the length of a text) and q, heads
    times head size; q numbers and one for each head are kept.
Use when: texts see all that is before them. Not when: there is a window that is shorter, or a soft cap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from luthier.kernels.backend import Backend, Run, Seen


def causal_attention(
    query: Float[Tensor, "n heads size"],
    key: Float[Tensor, "m groups size"],
    value: Float[Tensor, "m groups size"],
    runs: Sequence[Run],
    scale: float,
    backend: Backend,
    *,
    seen: Seen | None = None,
) -> Float[Tensor, "n heads size"]:
    """The attention of the texts that `runs` lays end to end, each after what it sees."""
    attended: Tensor = _CausalAttention.apply(query, key, value, (tuple(runs), scale, seen), backend)
    return attended


class _CausalAttention(Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        settings: tuple[tuple[Run, ...], float, Seen | None],
        backend: Backend,
    ) -> Tensor:
        out, kept = backend.attend(query, key, value, *settings)
        ctx.settings, ctx.backend = settings, backend
        ctx.save_for_backward(query, key, value, out, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, out, *kept = ctx.saved_tensors
        given = (grad.contiguous(), query, key, value, out, kept)
        found: tuple[Tensor, ...] = ctx.backend.attend_backward(*given, *ctx.settings)
        return (*found, None, None)
