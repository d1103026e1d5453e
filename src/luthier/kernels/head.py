"""Head log-probabilities: log p(label) of selected rows, never holding the full logits.

Idea: the log-probability of a row depends on that row's hidden state alone, so its whole Jacobian is one vector of the
hidden size. With a frozen head that vector is computed chunk by chunk in the forward pass, while the logits are at
hand; the backward pass is a multiplication, whatever the objective does with the log-probabilities. A trainable head
needs the upstream weights for its own gradient: it keeps the slopes of as many rows as take no more memory than that
gradient, and recomputes those of further rows in the backward pass. Where only a few rows of the head are trained,
their slopes are kept from the forward pass, and nothing is computed twice.
Equation: z = s W h + b, c = cap tanh(z / cap); log p_y = c_y - logsumexp(c);
    d log p_y / d z = (1_y - p) (1 - (c / cap)^2).
Source: chunked cross-entropy as in Liger Kernel and Cut Cross-Entropy (arXiv 2411.09009); chunking is over rows, so no
sum over the vocabulary is ever split and the result does not depend on the chunk size.
Cost: 4 N V d FLOPs for N rows (6 N V d with a trainable head, and 2 V d for each row that is recomputed); memory
    chunk x V x 6 bytes + N d, and N (d + k) more while k rows are trained; at most 4 V d bytes more for a whole head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from luthier.kernels.backend import Backend
from luthier.kernels.many import Summand
from luthier.kernels.sums import add_to
from luthier.kernels.torch_backend import TorchBackend, wide

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

    `changes` are added to its rows; a row that is in several of them gets them all. `backend` computes it.
    """

    weight: Float[Tensor, "V d"]
    bias: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    cap: float | None = None
    changes: tuple[RowChange, ...] = ()
    backend: Backend = field(default_factory=TorchBackend)


def head_log_probs(
    hidden: Float[Tensor, "N d"], head: Head, labels: Int[Tensor, " N"], *, chunk_rows: int = CHUNK_ROWS
) -> Float[Tensor, " N"]:
    """log p(label) of each row, differentiable once in `hidden` and in the head's parameters.

    In float32, whatever the head computes in; a float64 head stays in float64.
    """
    ids = torch.cat([labels.new_empty(0), *(change.ids for change in head.changes)])
    added = torch.cat([head.weight.new_empty(0, head.weight.shape[1]).to(wide(head.weight)),
                       *(change.trained - change.start for change in head.changes)])  # fmt: skip
    settings = _Settings(head.scale, head.cap, chunk_rows, head.backend, torch.is_grad_enabled())
    return _HeadLogProbs.apply(hidden, head.weight, head.bias, added, labels, ids, settings)


def head_logits(hidden: Float[Tensor, "n d"], head: Head) -> Float[Tensor, "n V"]:
    """The logits of a few rows, without a graph: as the product gives them where there is nothing else to be done, or
    in float32 or wider."""
    logits = head.backend.product(hidden, head.weight, None)
    if not head.changes and head.scale == 1.0 and head.bias is None and head.cap is None:
        return logits
    logits = logits.to(wide(hidden))
    for change in head.changes:
        added = (change.trained - change.start).to(hidden.dtype)
        logits.index_add_(1, change.ids, (hidden @ added.t()).to(logits.dtype))
    if head.scale != 1.0:
        logits *= head.scale
    if head.bias is not None:
        logits += head.bias
    return logits if head.cap is None else torch.tanh_(logits.div_(head.cap)).mul_(head.cap)


@dataclass(frozen=True)
class _Settings:
    """What of a head is no tensor."""

    scale: float
    cap: float | None
    chunk_rows: int
    backend: Backend
    learns: bool


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
        settings: _Settings,
    ) -> Tensor:
        rule = _Rule(weight, bias, added.to(weight.dtype), ids, settings)
        ctx.head_trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        ctx.settings = settings
        frozen_gradient = hidden.requires_grad and not ctx.head_trains
        rows_gradient = added.requires_grad and not ctx.head_trains
        log_probs = torch.empty(len(hidden), dtype=wide(hidden), device=hidden.device)
        jacobian = torch.empty_like(hidden) if frozen_gradient else None
        kept = hidden.new_empty(len(hidden), len(ids), dtype=wide(hidden)) if rows_gradient else None
        chunks: list[Tensor] = []
        to_keep = _kept_rows(weight) if ctx.head_trains and settings.learns else 0
        for rows in _chunks(len(hidden), settings.chunk_rows):
            keeps = rows.stop <= to_keep
            asked = jacobian is not None or kept is not None or keeps
            log_probs[rows], slopes = rule.look(hidden[rows], labels[rows], slopes=asked)
            if keeps and slopes is not None:
                chunks.append(slopes.to(weight.dtype))
            if jacobian is not None and slopes is not None:
                rule.through(slopes.to(weight.dtype), out=jacobian[rows])
            if kept is not None and slopes is not None:
                kept[rows] = slopes[:, ids].to(kept.dtype)
        if ctx.head_trains:
            ctx.save_for_backward(hidden, weight, bias, added, labels, ids, *chunks)
        else:
            ctx.save_for_backward(jacobian, kept, hidden if rows_gradient else None)
        return log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        scale, chunk_rows = ctx.settings.scale, ctx.settings.chunk_rows
        if not ctx.head_trains:
            jacobian, kept, hidden = ctx.saved_tensors
            grad_hidden = None if jacobian is None else jacobian * upstream[:, None].to(jacobian.dtype)
            grad_added = None
            if kept is not None:
                grad_added = torch.zeros(kept.shape[1], hidden.shape[1], dtype=kept.dtype, device=kept.device)
                for rows in _chunks(len(hidden), chunk_rows):
                    slope = kept[rows] * upstream[rows, None]
                    grad_added += (slope.t() @ hidden[rows].to(slope.dtype)) * scale
            return (grad_hidden, None, None, grad_added, None, None, None)
        hidden, weight, bias, added, labels, ids, *kept_chunks = ctx.saved_tensors
        rule = _Rule(weight, bias, added.to(weight.dtype), ids, ctx.settings)
        grad_hidden = torch.empty_like(hidden)
        # Wide: hundreds of chunks are added up, and bfloat16 would round the late ones away.
        grad_weight = torch.zeros(weight.shape, dtype=wide(weight), device=weight.device)
        grad_bias = torch.zeros(len(weight), dtype=wide(weight), device=weight.device)
        for index, rows in enumerate(_chunks(len(hidden), chunk_rows)):
            known = index < len(kept_chunks)
            slopes = kept_chunks[index] if known else rule.slopes(hidden[rows], labels[rows])
            factors = upstream[rows]
            if bias is not None:
                grad_bias += factors.to(grad_bias.dtype) @ slopes.to(grad_bias.dtype)
            rule.through(slopes, out=grad_hidden[rows])
            grad_hidden[rows] *= factors[:, None].to(hidden.dtype)
            _add_product(grad_weight, slopes.t(), (hidden[rows] * factors[:, None]).to(hidden.dtype), scale)
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


@dataclass(frozen=True)
class _Rule:
    """A head inside an autograd function: from hidden states to log-probabilities and slopes, and back."""

    weight: Float[Tensor, "V d"]
    bias: Float[Tensor, " V"] | None
    added: Float[Tensor, "k d"]
    ids: Int[Tensor, " k"]
    settings: _Settings

    def look(
        self, hidden: Float[Tensor, "n d"], labels: Int[Tensor, " n"], *, slopes: bool
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, "n V"] | None]:
        """log p(label) of each row, and its slope in the logits, before scale, if asked for."""
        logits = self.settings.backend.product(hidden, self.weight, None)
        scale, cap = self.settings.scale, self.settings.cap
        if len(self.ids) or self.bias is not None or cap is not None or scale != 1.0:
            # Wide from here on, as each of these would round once more.
            logits = logits.to(wide(logits))
            if len(self.ids):
                logits.index_add_(1, self.ids, (hidden @ self.added.t()).to(logits.dtype))
            logits *= scale
            if self.bias is not None:
                logits += self.bias
        if cap is not None:
            logits = torch.tanh_(logits.div_(cap)).mul_(cap)
        bend = 1 - (logits / cap).square() if cap is not None and slopes else None
        log_probs, slope = self.settings.backend.label_slopes(logits, labels, slopes=slopes)
        if slope is not None and bend is not None:
            slope.mul_(bend)
        return log_probs, slope

    def slopes(self, hidden: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> Float[Tensor, "n V"]:
        """The slopes alone, in the precision of the weight."""
        _, found = self.look(hidden, labels, slopes=True)
        return cast(Tensor, found).to(self.weight.dtype)

    def through(self, slopes: Float[Tensor, "n V"], *, out: Float[Tensor, "n d"]) -> None:
        """Slopes in the logits as slopes in the hidden states, into `out`."""
        self.settings.backend.summed((Summand(slopes, self.weight, across=True),), out=out)
        if len(self.ids):
            out.addmm_(slopes[:, self.ids], self.added)
        if self.settings.scale != 1.0:
            out.mul_(self.settings.scale)


def _add_product(
    total: Float[Tensor, "V d"], left: Float[Tensor, "V n"], right: Float[Tensor, "n d"], scale: float
) -> None:
    """Add scale left right to a total that may be wider than they are."""
    if total.dtype == left.dtype:
        torch.addmm(total, left, right, alpha=scale, out=total)
    else:
        add_to(total, left @ right, scale=scale)


def _kept_rows(weight: Float[Tensor, "V d"]) -> int:
    """For how many rows a trained head keeps its slopes: as many as take the memory of its gradient, which is wide."""
    return weight.shape[1] * wide(weight).itemsize // weight.element_size()


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
