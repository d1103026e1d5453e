"""Products: several linear layers of one input, each with a low-rank term or without, and their backward pass.

Idea: layers that read the same input (queries, keys and values; gate and up) are one operation. Their low-rank factors
are multiplied as one wider matrix, the second factor is added to the output where it lies, and only what the backward
pass cannot cheaply make again is kept: the thin products of the first factors. Weights are trained or frozen; nothing
is computed for a frozen one.
Equation: y_i = W_i x + b_i + s_i B_i u_i, u_i = A_i x;
    dx = sum_i W_i^T dy_i + A_i^T du_i, du_i = s_i B_i^T dy_i, dA_i = du_i x^T, dB_i = s_i dy_i u_i^T, dW_i = dy_i x^T.
Source: Hu et al., arXiv 2106.09685, section 4.1, differentiated by hand.
Cost: 4 (in out + r (in + out)) FLOPs a token for a frozen layer, forward and backward, and 2 r (in + out) more for the
    factors' own gradients; r numbers a token are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor


@final
@dataclass(frozen=True)
class LowRankTerm:
    """`scale` up down x, added to the output of a linear layer."""

    down: Float[Tensor, "r in"]
    up: Float[Tensor, "out r"]
    scale: float


@final
@dataclass(frozen=True)
class Product:
    """A linear layer, and what an adapter adds to it."""

    weight: Float[Tensor, "out in"]
    bias: Float[Tensor, " out"] | None = None
    term: LowRankTerm | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Its tensors, `STRIDE` of them, as an autograd function takes them."""
        return (self.weight, self.bias, *((self.term.down, self.term.up) if self.term else (None, None)))


STRIDE = 4
"""Tensors of one product among the arguments of an autograd function."""


@final
class Products:
    """The products of one input, made from the arguments of an autograd function."""

    def __init__(self, tensors: Sequence[Tensor | None], scales: Sequence[float], dtype: torch.dtype) -> None:
        self.weights = [_there(weight) for weight in tensors[0::STRIDE]]
        self.biases = tensors[1::STRIDE]
        self.scales = scales
        self.dtype = dtype
        downs, ups = tensors[2::STRIDE], tensors[3::STRIDE]
        self.factors = next((down.dtype for down in downs if down is not None), dtype)
        self.ranks = [0 if down is None else len(down) for down in downs]
        thin = [down.to(dtype) for down in downs if down is not None]
        self.down = None if not thin else thin[0] if len(thin) == 1 else torch.cat(thin)
        # Scaled before it is rounded: the float32 factors are what is trained.
        self.ups = [None if up is None else (up * scale).to(dtype) for up, scale in zip(ups, scales, strict=True)]

    def forward(self, x: Float[Tensor, "n in"]) -> tuple[list[Float[Tensor, "n _"]], Float[Tensor, "n R"] | None]:
        """The outputs, and the thin products A x of all of them side by side."""
        low = None if self.down is None else x @ self.down.t()
        outputs = []
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            y = x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())
            up = self.ups[index]
            if low is not None and up is not None:
                y.addmm_(low[:, self._own(index)], up.t())
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
        grad_x: Tensor | None = None
        for index, (weight, up, grad) in enumerate(zip(self.weights, self.ups, grads, strict=True)):
            at = STRIDE * index
            if needs[at]:
                found[at] = grad.t() @ x
            if needs[at + 1]:
                found[at + 1] = grad.sum(0)
            if low is not None and grad_low is not None and up is not None:
                own = self._own(index)
                torch.mm(grad, up, out=grad_low[:, own])
                if needs[at + 3]:
                    found[at + 3] = (grad.t() @ low[:, own]).to(self.factors).mul_(self.scales[index])
            if input_needs:
                grad_x = grad @ weight if grad_x is None else grad_x.addmm_(grad, weight)
        if grad_low is not None and self.down is not None:
            if any(needs[2::STRIDE]):
                grad_down = (grad_low.t() @ x).to(self.factors)
                for index, rank in enumerate(self.ranks):
                    if rank and needs[STRIDE * index + 2]:
                        found[STRIDE * index + 2] = grad_down[self._own(index)]
            if grad_x is not None:
                grad_x.addmm_(grad_low, self.down)
        return grad_x, found

    def _own(self, index: int) -> slice:
        start = sum(self.ranks[:index])
        return slice(start, start + self.ranks[index])


def _there(weight: Tensor | None) -> Tensor:
    if weight is None:
        raise ValueError("a product without a weight")
    return weight
