"""Products of many rows in bfloat16, or with weights in fewer bits, on a CPU without instructions for them.

Idea: such a CPU takes the library's product of bfloat16 number by number, many times as long as one of floats. Weights
that are widened a piece at a time cost one more pass over them, and the product is one of floats; what is kept
in memory stays half as large, which is what a few rows are read from.
Cost: 16 MB of floats; one pass over the weight.
Use when: rows are too many for the kernels of few rows. Not when: the CPU has AVX512-BF16 or AMX.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, final

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_PIECE: Final = 1 << 22
"""Numbers of a weight that are widened at once."""


def multiplies_halves() -> bool:
    """Whether this CPU has instructions for products of bfloat16 numbers."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def multiplies_whole() -> bool:
    """Whether this CPU has instructions for products of whole numbers of eight bits, as native/whole.h takes them."""
    return bool(torch.cpu._is_vnni_supported())


def imitated(x: Tensor) -> bool:
    """Whether products of these numbers are bfloat16 on a CPU that has no instructions for them."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not multiplies_halves()


def product_of_many(
    x: Float[Tensor, "n in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "n out"]:
    """x W^T + b, added up in float32 and rounded once."""
    found, wide = x.new_empty(len(x), len(weight)), x.float()
    for own in _pieces(len(weight), weight.shape[1]):
        found[:, own] = F.linear(wide, weight[own].float(), None if bias is None else bias[own].float())
    return found


def product_by_library(
    x: Float[Tensor, "n in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "n out"]:
    """x W^T + b by the library, which gets floats where it would imitate products of bfloat16."""
    if imitated(x) and _is_plain_pair(x, weight):
        return product_of_many(x, weight, bias)
    return F.linear(x, weight, bias)


def product_of_many_bytes(
    x: Float[Tensor, "n in"], codes: Int8[Tensor, "out in"], scales: Float[Tensor, " out"]
) -> Float[Tensor, "n out"]:
    """x W^T for a weight of whole numbers with a scale for each row of it, rounded once."""
    found, wide = x.new_empty(len(x), len(codes)), x.float()
    for own in _pieces(len(codes), codes.shape[1]):
        found[:, own] = F.linear(wide, codes[own].float()).mul_(scales[own])
    return found


def product_of_many_codes(
    x: Float[Tensor, "n in"], outs: int, block: int, numbers: Callable[[int, int], Float[Tensor, " numbers"]]
) -> Float[Tensor, "n out"]:
    """x W^T for a weight of `outs` rows, whose numbers from one place to another `numbers` gives in float32, rounded
    once. The first place is at a multiple of `block`, which is even."""
    size = x.shape[1]
    found, wide = x.new_empty(len(x), outs), x.float()
    for own in _pieces(outs, size, whole=block // math.gcd(block, size)):
        weight = numbers(own.start * size, min(own.stop, outs) * size)
        found[:, own] = F.linear(wide, weight.view(-1, size))
    return found


def add_low_rank(
    y: Float[Tensor, "n out"], low: Float[Tensor, "n r"], up: Float[Tensor, "r out"]
) -> Float[Tensor, "n out"]:
    """`y` with low up added to it where it lies; added up in float32 where bfloat16 products are imitated."""
    return y.add_(low.float() @ up.float()) if imitated(y) else y.addmm_(low, up)


@final
class OurProducts(TorchFunctionMode):
    """While it is entered, modules of others multiply plain bfloat16 matrices by our products instead of imitated ones.

    For passes without a backward pass. `product` is that of a backend.
    """

    def __init__(self, product: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> None:
        super().__init__()
        self._product = product

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is F.linear and not given and not torch.is_grad_enabled() and _is_plain_pair(args[0], args[1]):
            x, weight = args[0], args[1]
            bias = args[2] if len(args) > 2 else None
            return self._product(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)
        return func(*args, **given)


def our_products(
    x: Tensor, product: Callable[[Tensor, Tensor, Tensor | None], Tensor]
) -> AbstractContextManager[object]:
    """`OurProducts` where products of such numbers are imitated and there is no backward pass; nothing elsewhere."""
    return OurProducts(product) if imitated(x) and not torch.is_grad_enabled() else nullcontext()


def _is_plain_pair(x: Tensor, weight: Tensor) -> bool:
    """Whether these are numbers of one kind, none of them a tensor that multiplies itself."""
    plain = type(x) is Tensor and type(weight) in (Tensor, nn.Parameter)
    return plain and x.dtype == weight.dtype == torch.bfloat16 and x.device.type == "cpu" and x.numel() > 0


def _pieces(outs: int, size: int, whole: int = 1) -> Iterator[slice]:
    """Rows of a weight that are widened at once, in parts of about one size: multiples of `whole` but for the last."""
    parts = max(1, -(-outs * size // _PIECE))
    height = -(-outs // (parts * whole)) * whole
    for first in range(0, outs, height):
        yield slice(first, first + height)
