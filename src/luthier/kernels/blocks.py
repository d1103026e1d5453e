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
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from luthier.kernels.backend import Backend
from luthier.kernels.products import STRIDE, Factor, Product, Products
from luthier.kernels.torch_backend import wide


def normed(
    x: Float[Tensor, "n d"], norm: Float[Tensor, " d"], eps: float, backend: Backend
) -> Float[Tensor, "n d"]:
    """The norm of `x` alone, as the last one of a model; its input and scale are kept."""
    h: Tensor = _made(_Normed, x, norm, eps, backend)
    return h


def normed_products(
    x: Float[Tensor, "n d"], norm: Float[Tensor, " d"], eps: float, products: tuple[Product, ...], backend: Backend
) -> tuple[Float[Tensor, "n _"], ...]:
    """The products of the normed `x`, with gradients for `x`, the norm, the weights and the adapters' factors."""
    if _are_bare(products):
        return tuple(_bare_products(backend.norm(x, norm, eps)[0], products, backend))
    outputs: tuple[Tensor, ...] = _made(_NormedProducts, x, norm, eps, backend, _factors(products), *_flat(products))
    return outputs


def added_product(
    x: Float[Tensor, "n d"], inner: Float[Tensor, "n in"], product: Product, backend: Backend
) -> Float[Tensor, "n d"]:
    """`x` and the product of `inner`."""
    if _are_bare((product,)):
        return _bare_products(inner, (product,), backend)[0].add_(x)
    added: Tensor = _made(_AddedProduct, x, inner, backend, _factors((product,)), *product.tensors())
    return added


def gated_feed_forward(
    x: Float[Tensor, "n d"],
    norm: Float[Tensor, " d"],
    eps: float,
    products: tuple[Product, Product, Product],
    backend: Backend,
) -> Float[Tensor, "n d"]:
    """`x` and the gated feed-forward of the normed `x`; the products are gate, up and down."""
    if _are_bare(products):
        gate, up = _bare_products(backend.norm(x, norm, eps)[0], products[:2], backend)
        return _bare_products(backend.gated(gate, up), products[2:], backend)[0].add_(x)
    made: Tensor = _made(_GatedFeedForward, x, norm, eps, backend, _factors(products), *_flat(products))
    return made


def rotated(
    x: Float[Tensor, "n heads size"],
    cosines: Float[Tensor, "n half"],
    sines: Float[Tensor, "n half"],
    backend: Backend,
) -> Float[Tensor, "n heads size"]:
    """Each head's first and second half, turned against each other by the angles of its position."""
    turned: Tensor = _made(_Rotated, x, cosines, sines, backend)
    return turned


def _made(operation: type[torch.autograd.Function], *given: Any) -> Any:
    """What an operation makes of its arguments; without a graph its forward pass alone, as keeping books takes longer
    than a small product."""
    return operation.apply(*given) if torch.is_grad_enabled() else operation.forward(_Unkept(), *given)


def _are_bare(products: tuple[Product, ...]) -> bool:
    """Whether there is no graph and nothing is on the layers: most of the time when text is made."""
    return not torch.is_grad_enabled() and all(each.term is None and each.around is None for each in products)


def _bare_products(
    x: Float[Tensor, "n in"], products: tuple[Product, ...], backend: Backend
) -> list[Float[Tensor, "n _"]]:
    """What `Products` makes of bare layers."""
    return backend.products(x, [(product.weight, product.bias) for product in products])


class _Unkept:
    """Stands where autograd keeps what the backward pass needs, when there is none."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep nothing."""


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor, eps: float, backend: Backend) -> Tensor:
        h, inverse = backend.norm(x, norm, eps)
        ctx.backend = backend
        ctx.save_for_backward(x, norm, inverse)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, norm, inverse = ctx.saved_tensors
        return (*_through_the_norm(ctx, grad, x, norm, inverse, None), None, None)


class _NormedProducts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm: Tensor,
        eps: float,
        backend: Backend,
        factors: tuple[Factor, ...],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        h, inverse = backend.norm(x, norm, eps)
        outputs, low = Products(tensors, factors, x.dtype, backend).forward(h)
        ctx.backend, ctx.factors = backend, factors
        ctx.save_for_backward(x, norm, inverse, low, *tensors)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, norm, inverse, low, *tensors = ctx.saved_tensors
        products = Products(tensors, ctx.factors, x.dtype, ctx.backend)
        needs = ctx.needs_input_grad
        h = ctx.backend.normed(x, norm, inverse)
        grad_h, found = products.backward(h, low, grads, needs[5:], input_needs=any(needs[:2]))
        del h
        grad_x, grad_norm = _through_the_norm(ctx, grad_h, x, norm, inverse, None)
        return (grad_x, grad_norm, None, None, None, *found)


class _AddedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        inner: Tensor,
        backend: Backend,
        factors: tuple[Factor, ...],
        *tensors: Tensor | None,
    ) -> Tensor:
        (y,), low = Products(tensors, factors, inner.dtype, backend).forward(inner)
        ctx.backend, ctx.factors = backend, factors
        ctx.save_for_backward(inner, low, *tensors)
        return y.add_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        inner, low, *tensors = ctx.saved_tensors
        products = Products(tensors, ctx.factors, inner.dtype, ctx.backend)
        needs = ctx.needs_input_grad
        grad_inner, found = products.backward(inner, low, (grad,), needs[4:], input_needs=needs[1])
        return (grad if needs[0] else None, grad_inner, None, None, *found)


class _GatedFeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm: Tensor,
        eps: float,
        backend: Backend,
        factors: tuple[Factor, ...],
        *tensors: Tensor | None,
    ) -> Tensor:
        h, inverse = backend.norm(x, norm, eps)
        broad, narrow = _broad_and_narrow(tensors, factors, x.dtype, backend)
        (gate, up), low = broad.forward(h)
        (y,), low_down = narrow.forward(backend.gated(gate, up))
        ctx.backend, ctx.factors = backend, factors
        ctx.save_for_backward(x, norm, inverse, gate, up, low, low_down, *tensors)
        return y.add_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, norm, inverse, gate, up, low, low_down, *tensors = ctx.saved_tensors
        backend: Backend = ctx.backend
        broad, narrow = _broad_and_narrow(tensors, ctx.factors, x.dtype, backend)
        needs = ctx.needs_input_grad[5:]
        through = any(ctx.needs_input_grad[:2])
        below = through or any(needs[: 2 * STRIDE])
        inner = backend.gated(gate, up)
        grad_inner, found_down = narrow.backward(inner, low_down, (grad,), needs[2 * STRIDE :], input_needs=below)
        del inner
        if grad_inner is None:
            own = grad if ctx.needs_input_grad[0] else None
            return (own, None, None, None, None, *[None] * (2 * STRIDE), *found_down)
        grads = backend.gated_backward(grad_inner, gate, up)
        del grad_inner
        h = backend.normed(x, norm, inverse)
        grad_h, found = broad.backward(h, low, grads, needs[: 2 * STRIDE], input_needs=through)
        # What is widest goes before anything new is made.
        del h, grads
        grad_x, grad_norm = _through_the_norm(ctx, grad_h, x, norm, inverse, grad)
        return (grad_x, grad_norm, None, None, None, *found, *found_down)


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosines: Tensor, sines: Tensor, backend: Backend) -> Tensor:
        ctx.backend = backend
        ctx.save_for_backward(cosines, sines)
        return backend.rotated(x, cosines, sines)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        cosines, sines = ctx.saved_tensors
        return ctx.backend.rotated(grad.contiguous(), cosines, -sines), None, None, None


def _factors(products: tuple[Product, ...]) -> tuple[Factor, ...]:
    return tuple(product.factor for product in products)


def _flat(products: tuple[Product, ...]) -> list[Tensor | None]:
    return [tensor for product in products for tensor in product.tensors()]


def _broad_and_narrow(
    tensors: tuple[Tensor | None, ...] | list[Tensor | None],
    factors: tuple[Factor, ...],
    dtype: torch.dtype,
    backend: Backend,
) -> tuple[Products, Products]:
    """Gate and up, which share an input; and down."""
    broad = Products(tensors[: 2 * STRIDE], factors[:2], dtype, backend)
    return broad, Products(tensors[2 * STRIDE :], factors[2:], dtype, backend)


def _through_the_norm(
    ctx: Any,
    grad: Float[Tensor, "n d"] | None,
    x: Float[Tensor, "n d"],
    norm: Float[Tensor, " d"],
    inverse: Float[Tensor, "n 1"],
    added: Float[Tensor, "n d"] | None,
) -> tuple[Float[Tensor, "n d"] | None, Float[Tensor, " d"] | None]:
    """The gradients of a norm's input, with `added`, and of its weight, where `ctx` says that they are asked for."""
    if grad is None:
        return None, None
    unit = x.to(wide(x)) * inverse if ctx.needs_input_grad[1] else None
    grad_norm = None if unit is None else (grad * unit).sum(0).to(norm.dtype)
    if not ctx.needs_input_grad[0]:
        return None, grad_norm
    return ctx.backend.norm_backward(grad, x, norm, inverse, added), grad_norm
