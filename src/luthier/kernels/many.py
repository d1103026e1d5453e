"""Sums of products of many rows: a layer with its low-rank term, or what several layers send back to one input.

Idea: a library multiplies two matrices. What a layer with an adapter is, and what reaches an input that several layers
read, is a sum of such products over the same rows, which can stay in registers until it is complete: nothing is
rounded, written and read again between them, and a thin factor costs what its numbers cost. And a library lays out code
for each shape it meets, which takes as long as a small product where each step has another number of tokens.
Equation: y = sum_s x_s W_s^T + b; where W_s lies `across`, x_s W_s.
Cost: 2 n in out FLOPs a product; to pack a panel of W, in out for each 192 rows at most, and 128 bytes a number of `in`
    for each thread, up to 4,096 of them.
Use when: more rows than the kernels of few rows take, in bfloat16, on a CPU with AVX512-BF16. Not when: it has AMX,
    whose tiles are the library's; nor with odd sizes, as two numbers are one word; nor in float32, where as much is
    won only on processors that the library has no code for, and sums are less exact than its own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from luthier.kernels.halves import add_low_rank, multiplies_whole

NARROW: Final = 128
"""Columns of one side up to which products over rows are faster than the library's; those of whole weights are not."""
FEW: Final = 32
"""Rows up to which our products are faster than the library's, or as fast, on any CPU."""
SOME: Final = 128
"""Rows up to which a weight is read faster as it lies, by the kernels of few rows, than packed and multiplied, and one
in fewer bits is unpacked faster in the caches than in memory."""
DEEP: Final = 1 << 16
"""Inputs from which on, as those of a head of many words on the way back, the library's products are faster."""


class Summand(NamedTuple):
    """x W^T, or where W lies `across`, x W."""

    x: Float[Tensor, "n in"]
    weight: Tensor
    across: bool = False


@cache
def multiplies_many() -> bool:
    """Whether this CPU multiplies pairs of bfloat16 numbers in its vectors, and has nothing that is faster."""
    return bool(torch.cpu._is_avx512_bf16_supported()) and not torch.cpu._is_amx_tile_supported()


def few_rows(dtype: torch.dtype) -> int:
    """Rows up to which a weight is read as it lies, or as it is kept: more where vectors multiply pairs."""
    return SOME if dtype == torch.bfloat16 and multiplies_many() else FEW


def few_rows_of_bytes(dtype: torch.dtype) -> int:
    """The same of whole numbers of eight bits, which some processors without such vectors multiply as they are."""
    return max(few_rows(dtype), SOME if dtype == torch.bfloat16 and multiplies_whole() else FEW)


def by_library(
    parts: Sequence[Summand],
    bias: Float[Tensor, " out"] | None,
    out: Float[Tensor, "n out"] | None,
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor],
) -> Float[Tensor, "n out"]:
    """The sum, one product after another; `product` is x W^T + b."""
    x, weight, across = parts[0]
    if out is not None:
        y = torch.mm(x, weight if across else weight.t(), out=out)
        y = y if bias is None else y.add_(bias)
    elif across:
        y = x @ weight if bias is None else F.linear(x, weight.t(), bias)
    else:
        y = product(x, weight, bias)
    for x, weight, across in parts[1:]:
        y = y.addmm_(x, weight) if across else add_low_rank(y, x, weight.t())
    return y


def outs_of(part: Summand) -> int:
    """The columns of a product."""
    return part.weight.shape[1] if part.across else part.weight.shape[0]


def are_few(x: Float[Tensor, "n in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None) -> bool:
    """Whether these are few rows of numbers as the C++ reads them, and the weight is what it looks like, which a packed
    one is not."""
    if not 0 < len(x) <= few_rows(x.dtype) or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    plain = type(weight) in (nn.Parameter, Tensor) and weight.is_contiguous() and weight.numel() > 0
    return plain and weight.dtype == x.dtype and (bias is None or bias.dtype == x.dtype)


def are_taken(
    parts: Sequence[Summand], bias: Float[Tensor, " out"] | None, out: Float[Tensor, "n out"] | None
) -> bool:
    """Whether all of it is as the C++ reads it, in pairs, and no deeper than what it is faster with."""
    even = all(
        x.shape[1] % 2 == 0 and x.stride(0) % 2 == 0 and weight.stride(0) % 2 == 0 for x, weight, _ in parts
    )
    factors = [tensor for x, weight, _ in parts for tensor in (x, weight)]
    others = [tensor for tensor in (bias, out) if tensor is not None]
    return even and 0 < sum(x.shape[1] for x, _, _ in parts) < DEEP and lie_plain(*factors, *others)


def lie_plain(*tensors: Tensor) -> bool:
    """Whether bfloat16 numbers of each row lie side by side in memory, and none is a tensor that multiplies itself."""
    return all(
        type(tensor) in (Tensor, nn.Parameter) and tensor.dtype == torch.bfloat16 and tensor.stride(-1) == 1
        and tensor.device.type == "cpu" for tensor in tensors
    )  # fmt: skip


def laid_out(parts: Sequence[Summand]) -> Any:
    """The products as the C++ reads them; their tensors have to live as long."""
    numbers = [
        number
        for x, weight, across in parts
        for number in (x.data_ptr(), weight.data_ptr(), x.stride(0), weight.stride(0), x.shape[1], int(across))
    ]
    return (ctypes.c_int64 * len(numbers))(*numbers)
