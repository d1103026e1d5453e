"""Products: several linear layers of one input, each with a low-rank term or without, and their backward pass.

Idea: layers that read the same input (queries, keys and values; gate and up) are one operation. Their low-rank factors
are multiplied as one wider matrix, a layer and its second factor are one sum of products, as is all that comes back to
the input (many.py), and only what the backward pass cannot cheaply make again is kept: the thin products of the first
factors. Weights are trained or frozen; nothing is computed for a frozen one.
Where one batch holds rows of several adapters, the weights are multiplied once, and each adapter's factors with its own
rows.
Equation: y_i = W_i x + b_i + s_i B_i u_i, u_i = A_i x;
    dx = sum_i W_i^T dy_i + A_i^T du_i, du_i = s_i B_i^T dy_i, dA_i = du_i x^T, dB_i = s_i dy_i u_i^T, dW_i = dy_i x^T.
Source: Hu et al., arXiv 2106.09685, section 4.1, differentiated by hand.
Cost: 4 (in out + r (in + out)) FLOPs a token for a frozen layer, forward and backward, and 2 r (in + out) more for the
    factors' own gradients; r numbers a token are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from luthier.kernels.backend import Backend
from luthier.kernels.halves import add_low_rank
from luthier.kernels.many import Summand
from luthier.kernels.thin_pass import Around


@final
@dataclass(frozen=True)
class Share:
    """Rows of a batch, and the ranks of a term that are theirs: `first` to `last` of its factors."""

    start: int
    stop: int
    first: int
    last: int


@final
@dataclass(frozen=True)
class Factor:
    """What goes with the tensors of a product: the scale of its term, whose rows it is for, and what is around it."""

    scale: float = 1.0
    shares: tuple[Share, ...] | None = None
    around: Around | None = None


@final
@dataclass(frozen=True)
class LowRankTerm:
    """`scale` up down x, added to the output of a linear layer.

    With `shares` it is the terms of several adapters side by side, each of which is added to rows of its own.
    """

    down: Float[Tensor, "r in"]
    up: Float[Tensor, "out r"]
    scale: float
    shares: tuple[Share, ...] | None = None


@final
@dataclass(frozen=True)
class Product:
    """A linear layer, and what an adapter adds to it; or many do `around` it, where there is no backward pass."""

    weight: Float[Tensor, "out in"]
    bias: Float[Tensor, " out"] | None = None
    term: LowRankTerm | None = None
    around: Around | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Its tensors, `STRIDE` of them, as an autograd function takes them."""
        return (self.weight, self.bias, *((self.term.down, self.term.up) if self.term else (None, None)))

    @property
    def factor(self) -> Factor:
        """What is not a tensor of it."""
        term = self.term
        return Factor(around=self.around) if term is None else Factor(term.scale, term.shares, self.around)


STRIDE = 4
"""Tensors of one product among the arguments of an autograd function."""


@final
class Products:
    """The products of one input, made from the arguments of an autograd function."""

    def __init__(
        self,
        tensors: Sequence[Tensor | None],
        factors: Sequence[Factor],
        dtype: torch.dtype,
        backend: Backend,
    ) -> None:
        self.backend = backend
        self.weights = [_there(weight) for weight in tensors[0::STRIDE]]
        self.biases = tensors[1::STRIDE]
        self.factors = factors
        self.dtype = dtype
        downs, ups = tensors[2::STRIDE], tensors[3::STRIDE]
        self.trained = next((down.dtype for down in downs if down is not None), dtype)
        # Columns of the thin products: one for each rank, or, where rows are shared out, for the ranks of one row.
        self.ranks = [_width(down, factor) for down, factor in zip(downs, factors, strict=True)]
        self.downs = [None if down is None else down.to(dtype) for down in downs]
        thin = [down for down in self.downs if down is not None]
        self.shared = any(factor.shares is not None for factor in factors)
        self.down = None if self.shared or not thin else thin[0] if len(thin) == 1 else torch.cat(thin)
        # Scaled before it is rounded: the float32 factors are what is trained.
        self.ups = [None if up is None else (up * each.scale).to(dtype) for up, each in zip(ups, factors, strict=True)]

    def forward(self, x: Float[Tensor, "n in"]) -> tuple[list[Float[Tensor, "n _"]], Float[Tensor, "n R"] | None]:
        """The outputs, and the thin products A x of all of them side by side."""
        low = self._thin(x)
        outputs = []
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            around, up, parts = self.factors[index].around, self.ups[index], [Summand(x, weight)]
            apart = self.shared or around is not None
            if low is not None and up is not None and not apart:
                parts.append(Summand(low[:, self._own(index)], up))
            if around is None:
                y = self.backend.summed(parts, bias)
            else:
                y = around.through(x, partial(self.backend.product, weight=weight, bias=bias))
            if low is not None and up is not None and apart:
                for rows, own, ranks in self._shares(index):
                    add_low_rank(y[rows], low[rows, own], up[:, ranks].t())
            outputs.append(y)
        return outputs, low

    def backward(
        self,
        x: Float[Tensor, "n in"],
        low: Float[Tensor, "n R"] | None,
        grads: Sequence[Float[Tensor, "n _"]],
        needs: Sequence[bool],
        *,
        input_needs: bool,
    ) -> tuple[Float[Tensor, "n in"] | None, list[Tensor | None]]:
        """The gradients of the input and of the tensors; `needs` says of which tensors it is asked."""
        found: list[Tensor | None] = [None] * (STRIDE * len(self.weights))
        grad_low = None if low is None else torch.empty_like(low)
        parts: list[Summand] = []
        for index, (weight, up, grad) in enumerate(zip(self.weights, self.ups, grads, strict=True)):
            at = STRIDE * index
            if needs[at]:
                found[at] = self.backend.crossed(grad, x, weight.dtype)
            if needs[at + 1]:
                found[at + 1] = grad.sum(0)
            if low is not None and grad_low is not None and up is not None:
                for rows, own, ranks in self._shares(index):
                    part = Summand(grad[rows], up[:, ranks], across=True)
                    self.backend.summed((part,), out=grad_low[rows, own])
                if needs[at + 3]:
                    found[at + 3] = self._grad_up(index, grad, low, up)
            parts.append(Summand(grad, weight, across=True))
        if grad_low is not None and self.down is not None:
            parts.append(Summand(grad_low, self.down, across=True))
            if any(needs[2::STRIDE]):
                grad_down = self.backend.crossed(grad_low, x, self.trained)
                for index, rank in enumerate(self.ranks):
                    if rank and needs[STRIDE * index + 2]:
                        found[STRIDE * index + 2] = grad_down[self._own(index)]
        grad_x = self.backend.summed(parts) if input_needs else None
        if grad_low is not None and self.shared:
            self._backward_shared(x, grad_low, grad_x, needs, found)
        return grad_x, found

    def _thin(self, x: Float[Tensor, "n in"]) -> Float[Tensor, "n R"] | None:
        """A x of every term. Where rows are shared out, nobody reads what nobody has written."""
        if not self.shared:
            return None if self.down is None else self.backend.product(x, self.down, None)
        low = x.new_empty(len(x), sum(self.ranks))
        for index, down in enumerate(self.downs):
            if down is not None:
                for rows, own, ranks in self._shares(index):
                    torch.mm(x[rows], down[ranks].t(), out=low[rows, own])
        return low

    def _grad_up(
        self, index: int, grad: Float[Tensor, "n out"], low: Float[Tensor, "n R"], up: Float[Tensor, "out r"]
    ) -> Float[Tensor, "out r"]:
        scale = self.factors[index].scale
        if not self.shared:
            return self.backend.crossed(grad, low[:, self._own(index)], self.trained).mul_(scale)
        found = torch.zeros(up.shape, dtype=self.trained, device=up.device)
        for rows, own, ranks in self._shares(index):
            found[:, ranks] += grad[rows].t() @ low[rows, own]
        return found.mul_(scale)

    def _backward_shared(
        self,
        x: Float[Tensor, "n in"],
        grad_low: Float[Tensor, "n R"],
        grad_x: Float[Tensor, "n in"] | None,
        needs: Sequence[bool],
        found: list[Tensor | None],
    ) -> None:
        """The gradients of the first factors, into `found`, and through them, into `grad_x`, range by range."""
        for index, down in enumerate(self.downs):
            if down is None:
                continue
            grad_down = torch.zeros(down.shape, dtype=self.trained, device=down.device)
            for rows, own, ranks in self._shares(index):
                if needs[STRIDE * index + 2]:
                    grad_down[ranks] += grad_low[rows, own].t() @ x[rows]
                if grad_x is not None:
                    grad_x[rows].addmm_(grad_low[rows, own], down[ranks])
            if needs[STRIDE * index + 2]:
                found[STRIDE * index + 2] = grad_down

    def _own(self, index: int) -> slice:
        start = sum(self.ranks[:index])
        return slice(start, start + self.ranks[index])

    def _shares(self, index: int) -> list[tuple[slice, slice, slice]]:
        """Rows of the batch, columns of the thin products, and ranks of the factors that belong together."""
        own, shares = self._own(index), self.factors[index].shares
        if shares is None:
            return [(slice(None), own, slice(None))]
        return [
            (
                slice(share.start, share.stop),
                slice(own.start, own.start + share.last - share.first),
                slice(share.first, share.last),
            )
            for share in shares
        ]


def _width(down: Tensor | None, factor: Factor) -> int:
    if down is None or factor.shares is None:
        return 0 if down is None else len(down)
    return max((share.last - share.first for share in factor.shares), default=0)


def _there(weight: Tensor | None) -> Tensor:
    if weight is None:
        raise ValueError("a product without a weight")
    return weight
