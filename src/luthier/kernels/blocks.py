"""The halves of a transformer block as three operations with backward passes of their own.

What: normed products (queries, keys and values of a block's input), a product that is added to the residual stream, and
a whole gated feed-forward; and the rotation of queries and keys by their positions.
Idea: autograd keeps every intermediate. These keep the residual stream, the scale of its norm, the feed-forward's two
inner states and the thin products of adapters; what the norm and the activation made of them is made again in the
backward pass, element by element, which costs little beside the products.
Equation: h = w * (x / rms(x)), rms(x)^2 = mean(x^2) + eps; f(x) = x + D(silu(G h) * (U h)), silu(z) = z sigmoid(z).
Source: RMSNorm: Zhang and Sennrich, arXiv 1910.07467; SwiGLU: Shazeer, arXiv 2002.05202; RoPE: Su et al.,
    arXiv 2104.09864. The roundings are those of transformers' llama, which other models share.
Cost: FLOPs of the products (products.py); kept for the backward pass, in numbers a token: d + 1 (normed products),
    d + 1 + 2 f (feed-forward), the input of an added product, and the ranks of the adapters.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from luthier.kernels.products import STRIDE, Product, Products


def normed_products(
    x: Float[Tensor, "n d"], norm: Float[Tensor, " d"], eps: float, products: tuple[Product, ...]
) -> tuple[Float[Tensor, "n _"], ...]:
    """The products of the normed `x`, with gradients for `x`, the norm, the weights and the adapters' factors."""
    outputs: tuple[Tensor, ...] = _NormedProducts.apply(x, norm, eps, _scales(products), *_flat(products))
    return outputs


def added_product(x: Float[Tensor, "n d"], inner: Float[Tensor, "n in"], product: Product) -> Float[Tensor, "n d"]:
    """`x` and the product of `inner`."""
    added: Tensor = _AddedProduct.apply(x, inner, _scales((product,)), *product.tensors())
    return added


def gated_feed_forward(
    x: Float[Tensor, "n d"], norm: Float[Tensor, " d"], eps: float, gate: Product, up: Product, down: Product
) -> Float[Tensor, "n d"]:
    """`x` and the gated feed-forward of the normed `x`."""
    products = (gate, up, down)
    made: Tensor = _GatedFeedForward.apply(x, norm, eps, _scales(products), *_flat(products))
    return made


def rotated(
    x: Float[Tensor, "n heads size"], cosines: Float[Tensor, "n half"], sines: Float[Tensor, "n half"]
) -> Float[Tensor, "n heads size"]:
    """Each head's first and second half, turned against each other by the angles of its position."""
    turned: Tensor = _Rotated.apply(x, cosines, sines)
    return turned


class _NormedProducts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, eps: float, scales: tuple[float, ...], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        inverse = _inverse_rms(x, eps)
        outputs, low = Products(tensors, scales, x.dtype).forward(_normed(x, inverse, norm))
        ctx.scales = scales
        ctx.save_for_backward(x, norm, inverse, low, *tensors)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, norm, inverse, low, *tensors = ctx.saved_tensors
        products = Products(tensors, ctx.scales, x.dtype)
        through = any(ctx.needs_input_grad[:2])
        h = _normed(x, inverse, norm)
        grad_h, found = products.backward(h, low, grads, ctx.needs_input_grad[4:], input_needs=through)
        grad_x, grad_norm = (None, None) if grad_h is None else _norm_backward(grad_h, x, inverse, norm, ctx)
        return (grad_x, grad_norm, None, None, *found)


class _AddedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inner: Tensor, scales: tuple[float, ...], *tensors: Tensor | None) -> Tensor:
        (y,), low = Products(tensors, scales, inner.dtype).forward(inner)
        ctx.scales = scales
        ctx.save_for_backward(inner, low, *tensors)
        return y.add_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        inner, low, *tensors = ctx.saved_tensors
        products = Products(tensors, ctx.scales, inner.dtype)
        needs = ctx.needs_input_grad
        grad_inner, found = products.backward(inner, low, (grad,), needs[3:], input_needs=needs[1])
        return (grad if needs[0] else None, grad_inner, None, *found)


class _GatedFeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, eps: float, scales: tuple[float, ...], *tensors: Tensor | None
    ) -> Tensor:
        inverse = _inverse_rms(x, eps)
        wide, narrow = _wide_and_narrow(tensors, scales, x.dtype)
        (gate, up), low = wide.forward(_normed(x, inverse, norm))
        (y,), low_down = narrow.forward(F.silu(gate).mul_(up))
        ctx.scales = scales
        ctx.save_for_backward(x, norm, inverse, gate, up, low, low_down, *tensors)
        return y.add_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, norm, inverse, gate, up, low, low_down, *tensors = ctx.saved_tensors
        wide, narrow = _wide_and_narrow(tensors, ctx.scales, x.dtype)
        needs = ctx.needs_input_grad[4:]
        bent = F.silu(gate)
        through = any(ctx.needs_input_grad[:2])
        below = through or any(needs[: 2 * STRIDE])
        grad_inner, found_down = narrow.backward(bent * up, low_down, (grad,), needs[2 * STRIDE :], input_needs=below)
        if grad_inner is None:
            return (grad if ctx.needs_input_grad[0] else None, None, None, None, *[None] * (2 * STRIDE), *found_down)
        grad_up = bent.mul_(grad_inner)
        grad_gate = torch.ops.aten.silu_backward(grad_inner.mul_(up), gate)
        h = _normed(x, inverse, norm)
        grad_h, found = wide.backward(h, low, (grad_gate, grad_up), needs[: 2 * STRIDE], input_needs=through)
        grad_x, grad_norm = (None, None) if grad_h is None else _norm_backward(grad_h, x, inverse, norm, ctx)
        if grad_x is not None:
            grad_x.add_(grad)
        return (grad_x, grad_norm, None, None, *found, *found_down)


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return _turned(x, cosines, sines)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        cosines, sines = ctx.saved_tensors
        return _turned(grad, cosines, -sines), None, None


def _scales(products: tuple[Product, ...]) -> tuple[float, ...]:
    return tuple(product.term.scale if product.term else 1.0 for product in products)


def _flat(products: tuple[Product, ...]) -> list[Tensor | None]:
    return [tensor for product in products for tensor in product.tensors()]


def _wide_and_narrow(
    tensors: tuple[Tensor | None, ...] | list[Tensor | None], scales: tuple[float, ...], dtype: torch.dtype
) -> tuple[Products, Products]:
    """Gate and up, which share an input; and down."""
    return Products(tensors[: 2 * STRIDE], scales[:2], dtype), Products(tensors[2 * STRIDE :], scales[2:], dtype)


def _inverse_rms(x: Float[Tensor, "n d"], eps: float) -> Float[Tensor, "n 1"]:
    wide = x.to(_wide(x))
    return wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()


def _normed(x: Float[Tensor, "n d"], inverse: Float[Tensor, "n 1"], norm: Float[Tensor, " d"]) -> Float[Tensor, "n d"]:
    return (x.to(_wide(x)) * inverse).to(x.dtype).mul_(norm)


def _norm_backward(
    grad: Float[Tensor, "n d"],
    x: Float[Tensor, "n d"],
    inverse: Float[Tensor, "n 1"],
    norm: Float[Tensor, " d"],
    ctx: Any,
) -> tuple[Float[Tensor, "n d"] | None, Float[Tensor, " d"] | None]:
    """The gradients of the norm's input and weight; `ctx` says which are asked for."""
    unit = x.to(_wide(x)) * inverse
    grad_norm = (grad * unit).sum(0).to(norm.dtype) if ctx.needs_input_grad[1] else None
    if not ctx.needs_input_grad[0]:
        return None, grad_norm
    wide = (grad * norm).to(_wide(x))
    along = torch.linalg.vecdot(wide, unit)[:, None].div_(-x.shape[-1])
    return wide.addcmul_(unit, along).mul_(inverse).to(x.dtype), grad_norm


def _turned(
    x: Float[Tensor, "n heads size"], cosines: Float[Tensor, "n half"], sines: Float[Tensor, "n half"]
) -> Float[Tensor, "n heads size"]:
    turned = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    first, second = x.chunk(2, -1)
    low, high = turned.chunk(2, -1)
    cosine, sine = cosines[:, None], sines[:, None]
    torch.mul(first, cosine, out=low).addcmul_(second, sine, value=-1)
    torch.mul(second, cosine, out=high).addcmul_(first, sine)
    return turned


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
