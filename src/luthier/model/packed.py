"""Packed weights: a frozen matrix in fewer bits that is a tensor to everybody else.

Idea: a linear layer's weight is replaced by a tensor that holds codes and scales and unpacks itself wherever somebody
computes with it. So neither a model of the zoo, nor an adapter, nor our own operations know of it; each of them sees a
weight of the shape and precision there was. What is unpacked lives as long as the product it is for: the pool (or the
GPU's allocator) gives the same memory to the next layer. Nothing unpacked is kept for the backward pass, which unpacks
again.
Source: QLoRA, Dettmers et al., arXiv 2305.14314, section 3; torch's wrapper subclasses.
Cost: the codes instead of the weight; unpacking once for each product, forward and backward.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only

from luthier.kernels.backend import Codes


@dataclass(frozen=True)
class Packing(ABC):
    """A matrix (out, in) as its quantizer keeps it. Fields that are tensors are what takes memory."""

    shape: tuple[int, int]

    @abstractmethod
    def dense(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """The matrix it stands for, in memory of its own."""

    def product(self, x: Float[Tensor, "n in"]) -> Float[Tensor, "n out"] | None:
        """x W^T, where the method computes it in a way of its own; None where it is that with the matrix it stands for.

        The gradient of x is always that with the matrix.
        """
        return None

    @property
    def rows_apart(self) -> bool:
        """Whether a row of its product with a few rows is the same, bit for bit, in any company."""
        return False

    def as_codes(self) -> Codes | None:
        """It as codes that the kernels know, where it is such and its product is theirs."""
        return None

    def to(self, device: torch.device) -> Packing:
        """It on `device`."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return replace(self, **moved)

    def file_tensors(self, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """It in a file that other tools read, by names below its module's; empty where there is no such file.

        `dtype` is that of the numbers it stands for.
        """
        return {}

    def file_config(self) -> Mapping[str, object]:
        """What `config.json` says of such files as its `quantization_config`."""
        return {}

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors by the names of their fields."""
        held = {field.name: vars(self)[field.name] for field in fields(self)}
        return {name: value for name, value in held.items() if isinstance(value, Tensor)}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


Pack = Callable[[Float[Tensor, "out in"]], Packing]
"""A matrix in fewer bits."""


@final
class PackedWeight(Tensor):
    """A packing with the looks of a weight: of its shape, or transposed where a module keeps (in, out).

    `pack` is what made the packing, for whoever has changed the matrix.
    """

    packing: Packing
    pack: Pack
    transposed: bool

    @staticmethod
    def __new__(cls, packing: Packing, dtype: torch.dtype, pack: Pack, *, transposed: bool = False) -> PackedWeight:
        rows, columns = packing.shape
        shape, strides = ((columns, rows), (1, columns)) if transposed else ((rows, columns), (columns, 1))
        device = next(iter(packing.tensors.values())).device
        made: PackedWeight = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, strides, dtype=dtype, device=device
        )
        made.packing, made.pack, made.transposed = packing, pack, transposed
        return made

    def matrix(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        """The weight as (out, in), unpacked."""
        return self.packing.dense(self.dtype if dtype is None else dtype)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is F.linear and isinstance(args[1], cls):
            bias = args[2] if len(args) > 2 else given.get("bias")
            if not torch.is_grad_enabled():
                return _product(args[0], args[1], bias)
            # By itself autograd would keep what the transposed weight was unpacked to.
            return _PackedProduct.apply(args[0], args[1], bias)
        if func is torch.addmm and isinstance(args[2], cls) and args[2].transposed and not given:
            return _PackedProduct.apply(args[1], args[2], args[0])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **given)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            (own,) = args
            return cls(own.packing, own.dtype, own.pack, transposed=own.transposed)
        if func is torch.ops.aten.t.default:
            (own,) = args
            return cls(own.packing, own.dtype, own.pack, transposed=not own.transposed)
        if func is torch.ops.aten.mm.default and isinstance(args[1], cls) and args[1].transposed:
            return _product(args[0], args[1], None)
        unpacked = tree_map_only(cls, _dense, (tuple(args), dict(kwargs or {})))
        return func(*unpacked[0], **unpacked[1])

    def packed_again(self, matrix: Float[Tensor, "out in"]) -> PackedWeight:
        """Another matrix, packed as this one is."""
        return PackedWeight(self.pack(matrix), self.dtype, self.pack, transposed=self.transposed)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedWeight({type(self.packing).__name__}, {tuple(self.shape)}, {self.dtype})"


class _PackedProduct(torch.autograd.Function):
    """x W^T + b that keeps the packed weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        ctx.weight, ctx.biased = weight, bias is not None
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_x = grad @ ctx.weight.matrix(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_bias = grad.flatten(0, -2).sum(0) if ctx.biased and ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias


def _product(x: Float[Tensor, "*batch in"], weight: PackedWeight, bias: Tensor | None) -> Float[Tensor, "*batch out"]:
    own = weight.packing.product(x.reshape(-1, x.shape[-1]))
    if own is None:
        return F.linear(x, weight.matrix(x.dtype), bias)
    found = own.view(*x.shape[:-1], -1)
    return found if bias is None else found + bias


def _dense(weight: PackedWeight) -> Tensor:
    found = weight.matrix()
    return found.t() if weight.transposed else found


def stored_bytes(tensor: Tensor) -> int:
    """Bytes that a parameter takes in memory."""
    return tensor.packing.nbytes if isinstance(tensor, PackedWeight) else tensor.nbytes


def packing_of(tensor: Tensor) -> Packing | None:
    """What a parameter is kept as, when it is packed."""
    return tensor.packing if isinstance(tensor, PackedWeight) else None
