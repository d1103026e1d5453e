"""Head log-probabilities: log p(label) of selected rows, never holding the full logits.

Idea: the log-probability of a row depends on that row's hidden state alone, so its whole Jacobian is one vector of the
hidden size. With a frozen head that vector is computed chunk by chunk in the forward pass, while the logits are at
hand; the backward pass is a multiplication, whatever the objective does with the log-probabilities. A trainable head
recomputes each chunk in the backward pass instead, because its own gradient needs the upstream weights. Where only a
few rows of the head are trained, their slopes are kept from the forward pass, and nothing is computed twice.
Equation: z = s W h + b, c = cap tanh(z / cap); log p_y = c_y - logsumexp(c);
    d log p_y / d z = (1_y - p) (1 - (c / cap)^2).
Source: chunked cross-entropy as in Liger Kernel and Cut Cross-Entropy (arXiv 2411.09009); chunking is over rows, so no
sum over the vocabulary is ever split and the result does not depend on the chunk size.
Cost: 4 N V d FLOPs for N rows (6 N V d + 2 N V d recompute with a trainable head); memory chunk x V x 6 bytes + N d,
    and N (d + k) more while k rows are trained.
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
class RowChange:
    """Rows of a head that are trained apart from it: `trained` - `start` is added to its rows `ids`."""

    ids: Int[Tensor, " k"]
    trained: Float[Tensor, "k d"]
    start: Float[Tensor, "k d"]


@dataclass(frozen=True)
class Head:
    """The output head of a model: `weight` (V, d), `bias` (V,) or None, multiplier `scale`, soft cap `cap` or None.

    `changes` are added to its rows; a row that is in several of them gets them all.
    """

    weight: Float[Tensor, "V d"]
    bias: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    cap: float | None = None
    changes: tuple[RowChange, ...] = ()


def head_log_probs(
    hidden: Float[Tensor, "N d"], head: Head, labels: Int[Tensor, " N"], *, chunk_rows: int = CHUNK_ROWS
) -> Float[Tensor, " N"]:
    """log p(label) of each row, differentiable once in `hidden` and in the head's parameters.

    In float32, whatever the head computes in; a float64 head stays in float64.
    """
    ids = torch.cat([labels.new_empty(0), *(change.ids for change in head.changes)])
    added = torch.cat([head.weight.new_empty(0, head.weight.shape[1]).to(_wide(head.weight)),
                       *(change.trained - change.start for change in head.changes)])  # fmt: skip
    settings = (head.scale, head.cap, chunk_rows)
    return _HeadLogProbs.apply(hidden, head.weight, head.bias, added, labels, ids, settings)


class _HeadLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        added: Tensor,
        labels: Tensor,
        ids: Tensor,
        settings: tuple[float, float | None, int],
    ) -> Tensor:
        scale, cap, chunk_rows = settings
        head = Head(weight, bias, scale, cap)
        low_added = added.to(weight.dtype)
        ctx.head_trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        ctx.settings = settings
        frozen_gradient = hidden.requires_grad and not ctx.head_trains
        rows_gradient = added.requires_grad and not ctx.head_trains
        log_probs = torch.empty(len(hidden), dtype=_wide(hidden), device=hidden.device)
        jacobian = torch.empty_like(hidden) if frozen_gradient else None
        slopes = hidden.new_empty(len(hidden), len(ids), dtype=_wide(hidden)) if rows_gradient else None
        for rows in _chunks(len(hidden), chunk_rows):
            capped = _capped_logits(hidden[rows], head, low_added, ids)
            normaliser = torch.logsumexp(capped, -1)
            log_probs[rows] = capped.gather(1, labels[rows, None])[:, 0] - normaliser
            if jacobian is not None or slopes is not None:
                slope = _slope(capped, normaliser, labels[rows], cap)
                if jacobian is not None:
                    jacobian[rows] = _through(slope.to(weight.dtype), weight, low_added, ids) * scale
                if slopes is not None:
                    slopes[rows] = slope[:, ids]
        if ctx.head_trains:
            ctx.save_for_backward(hidden, weight, bias, added, labels, ids)
        else:
            ctx.save_for_backward(jacobian, slopes, hidden if rows_gradient else None)
        return log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        scale, cap, chunk_rows = ctx.settings
        if not ctx.head_trains:
            jacobian, slopes, hidden = ctx.saved_tensors
            grad_hidden = None if jacobian is None else jacobian * upstream[:, None].to(jacobian.dtype)
            grad_added = None
            if slopes is not None:
                grad_added = torch.zeros(slopes.shape[1], hidden.shape[1], dtype=slopes.dtype, device=slopes.device)
                for rows in _chunks(len(hidden), chunk_rows):
                    slope = slopes[rows] * upstream[rows, None]
                    grad_added += (slope.t() @ hidden[rows].to(slope.dtype)) * scale
            return (grad_hidden, None, None, grad_added, None, None, None)
        hidden, weight, bias, added, labels, ids = ctx.saved_tensors
        head = Head(weight, bias, scale, cap)
        low_added = added.to(weight.dtype)
        grad_hidden = torch.empty_like(hidden)
        # Wide: hundreds of chunks are added up, and bfloat16 would round the late ones away.
        grad_weight = torch.zeros(weight.shape, dtype=_wide(weight), device=weight.device)
        grad_bias = torch.zeros(len(weight), dtype=_wide(weight), device=weight.device)
        for rows in _chunks(len(hidden), chunk_rows):
            capped = _capped_logits(hidden[rows], head, low_added, ids)
            slope = _slope(capped, torch.logsumexp(capped, -1), labels[rows], cap) * upstream[rows, None]
            grad_bias += slope.sum(0)
            low = slope.to(weight.dtype)
            grad_hidden[rows] = _through(low, weight, low_added, ids) * scale
            grad_weight += (low.t() @ hidden[rows]) * scale
        return (
            grad_hidden if ctx.needs_input_grad[0] else None,
            grad_weight.to(weight.dtype) if weight.requires_grad else None,
            grad_bias.to(bias.dtype) if bias is not None and bias.requires_grad else None,
            # What is added to a row has the gradient of that row.
            grad_weight[ids].to(added.dtype) if ctx.needs_input_grad[3] else None,
            None,
            None,
            None,
        )


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _through(
    slope: Float[Tensor, "n V"], weight: Float[Tensor, "V d"], added: Float[Tensor, "k d"], ids: Int[Tensor, " k"]
) -> Float[Tensor, "n d"]:
    """A slope in the logits as a slope in the hidden states."""
    back = slope @ weight
    return back + slope[:, ids] @ added if len(ids) else back


def _capped_logits(
    hidden: Float[Tensor, "n d"], head: Head, added: Float[Tensor, "k d"], ids: Int[Tensor, " k"]
) -> Float[Tensor, "n V"]:
    # Wide from here on: a bfloat16 log-sum over 150,000 entries loses the small ones.
    logits = (hidden @ head.weight.t()).to(_wide(hidden))
    if len(ids):
        logits.index_add_(1, ids, (hidden @ added.t()).to(logits.dtype))
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
