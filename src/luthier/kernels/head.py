"""Head log-probabilities: log p(label) of selected rows, never holding the full logits.

Idea: the log-probability of a row depends on that row's hidden state alone, so its whole Jacobian is one vector of the
hidden size. With a frozen head that vector is computed chunk by chunk in the forward pass, while the logits are at
hand; the backward pass is a multiplication, whatever the objective does with the log-probabilities. A trainable head
recomputes each chunk in the backward pass instead, because its own gradient needs the upstream weights.
Equation: z = s W h + b, c = cap tanh(z / cap); log p_y = c_y - logsumexp(c);
    d log p_y / d z = (1_y - p) (1 - (c / cap)^2).
Source: chunked cross-entropy as in Liger Kernel and Cut Cross-Entropy (arXiv 2411.09009); chunking is over rows, so no
sum over the vocabulary is ever split and the result does not depend on the chunk size.
Cost: 4 N V d FLOPs for N rows (6 N V d + 2 N V d recompute with a trainable head); memory chunk x V x 6 bytes + N d.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ROWS = 256
"""Rows a chunk: large enough that reading W costs less than the product, small enough that logits stay a buffer."""


@dataclass(frozen=True)
class Head:
    """The output head of a model: `weight` (V, d), `bias` (V,) or None, multiplier `scale`, soft cap `cap` or None."""

    weight: Float[Tensor, "V d"]
    bias: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    cap: float | None = None


def head_log_probs(
    hidden: Float[Tensor, "N d"], head: Head, labels: Int[Tensor, " N"], *, chunk_rows: int = CHUNK_ROWS
) -> Float[Tensor, " N"]:
    """log p(label) of each row, differentiable once in `hidden` and in the head's parameters.

    In float32, whatever the head computes in; a float64 head stays in float64.
    """
    return _HeadLogProbs.apply(hidden, head.weight, head.bias, labels, head.scale, head.cap, chunk_rows)


class _HeadLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        scale: float,
        cap: float | None,
        chunk_rows: int,
    ) -> Tensor:
        head = Head(weight, bias, scale, cap)
        ctx.head_trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        ctx.settings = (scale, cap, chunk_rows)
        frozen_gradient = hidden.requires_grad and not ctx.head_trains
        log_probs = torch.empty(len(hidden), dtype=_wide(hidden), device=hidden.device)
        jacobian = torch.empty_like(hidden) if frozen_gradient else None
        for rows in _chunks(len(hidden), chunk_rows):
            capped = _capped_logits(hidden[rows], head)
            normaliser = torch.logsumexp(capped, -1)
            log_probs[rows] = capped.gather(1, labels[rows, None])[:, 0] - normaliser
            if jacobian is not None:
                slope = _slope(capped, normaliser, labels[rows], cap)
                jacobian[rows] = slope.to(weight.dtype) @ weight * scale
        if jacobian is not None:
            ctx.save_for_backward(jacobian)
        elif ctx.head_trains:
            ctx.save_for_backward(hidden, weight, bias, labels)
        return log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if not ctx.head_trains:
            (jacobian,) = ctx.saved_tensors
            return (jacobian * upstream[:, None].to(jacobian.dtype), None, None, None, None, None, None)
        hidden, weight, bias, labels = ctx.saved_tensors
        scale, cap, chunk_rows = ctx.settings
        head = Head(weight, bias, scale, cap)
        grad_hidden = torch.empty_like(hidden)
        # Wide: hundreds of chunks are added up, and bfloat16 would round the late ones away.
        grad_weight = torch.zeros(weight.shape, dtype=_wide(weight), device=weight.device)
        grad_bias = torch.zeros(len(weight), dtype=_wide(weight), device=weight.device)
        for rows in _chunks(len(hidden), chunk_rows):
            capped = _capped_logits(hidden[rows], head)
            slope = _slope(capped, torch.logsumexp(capped, -1), labels[rows], cap) * upstream[rows, None]
            grad_bias += slope.sum(0)
            low = slope.to(weight.dtype)
            grad_hidden[rows] = low @ weight * scale
            grad_weight += (low.t() @ hidden[rows]) * scale
        return (
            grad_hidden if ctx.needs_input_grad[0] else None,
            grad_weight.to(weight.dtype) if weight.requires_grad else None,
            grad_bias.to(bias.dtype) if bias is not None and bias.requires_grad else None,
            None,
            None,
            None,
            None,
        )


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _capped_logits(hidden: Float[Tensor, "n d"], head: Head) -> Float[Tensor, "n V"]:
    # Wide from here on: a bfloat16 log-sum over 150,000 entries loses the small ones.
    logits = (hidden @ head.weight.t()).to(_wide(hidden))
    if head.scale != 1.0:
        logits *= head.scale
    if head.bias is not None:
        logits += head.bias
    return logits if head.cap is None else torch.tanh_(logits.div_(head.cap)).mul_(head.cap)


def _slope(
    capped: Float[Tensor, "n V"], normaliser: Float[Tensor, " n"], labels: Int[Tensor, " n"], cap: float | None
) -> Float[Tensor, "n V"]:
    """d log p(label) / d logits, before scale; overwrites `capped` when there is no cap."""
    inner = None if cap is None else 1 - (capped / cap).square()
    slope = capped.sub_(normaliser[:, None]).exp_().neg_()
    slope[torch.arange(len(labels), device=labels.device), labels] += 1
    return slope if inner is None else slope.mul_(inner)
