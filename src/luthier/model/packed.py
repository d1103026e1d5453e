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
from dataclasses import dataclass, fields
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only

from luthier.core.errors import RecipeError
from luthier.model.language_model import LanguageModel
from luthier.model.sites import Site


@dataclass(frozen=True)
class Packing(ABC):
    """A matrix (out, in) as its quantizer keeps it. Fields that are tensors are what takes memory."""

    shape: tuple[int, int]

    @abstractmethod
    def dense(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """The matrix it stands for, in memory of its own."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors by the names of their fields."""
        held = {field.name: vars(self)[field.name] for field in fields(self)}
        return {name: value for name, value in held.items() if isinstance(value, Tensor)}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@final
class PackedWeight(Tensor):
    """A packing with the looks of a weight: of its shape, or transposed where a module keeps (in, out)."""

    packing: Packing
    transposed: bool

    @staticmethod
    def __new__(cls, packing: Packing, dtype: torch.dtype, *, transposed: bool = False) -> PackedWeight:
        shape = packing.shape[::-1] if transposed else packing.shape
        device = next(iter(packing.tensors.values())).device
        made: PackedWeight = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)  # type: ignore[attr-defined]
        made.packing, made.transposed = packing, transposed
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
            # By itself autograd would keep what the transposed weight was unpacked to.
            return _PackedProduct.apply(args[0], args[1], args[2] if len(args) > 2 else given.get("bias"))
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
            return cls(own.packing, own.dtype, transposed=own.transposed)
        unpacked = tree_map_only(cls, _dense, (tuple(args), dict(kwargs or {})))
        return func(*unpacked[0], **unpacked[1])

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedWeight({type(self.packing).__name__}, {tuple(self.shape)}, {self.dtype})"


class _PackedProduct(torch.autograd.Function):
    """x W^T + b that keeps the packed weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        ctx.weight, ctx.biased = weight, bias is not None
        return F.linear(x, weight.matrix(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_x = grad @ ctx.weight.matrix(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_bias = grad.flatten(0, -2).sum(0) if ctx.biased and ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias


def _dense(weight: PackedWeight) -> Tensor:
    found = weight.matrix()
    return found.t() if weight.transposed else found


@torch.no_grad()
def pack_weights(model: LanguageModel, pack: Callable[[Float[Tensor, "out in"]], Packing]) -> int:
    """Pack the weight of every linear layer but the head; how many there were.

    Raises RecipeError when something is attached, or there is nothing to pack.
    """
    if model.attachments:
        raise RecipeError(
            f"{', '.join(model.attachments)} is on the model, which cannot be packed then",
            do="pack it first, then attach",
        )
    sites = [site for site in model.sites.linear() if site.layer is not None]
    if not sites:
        raise RecipeError(
            f"{model.source} has no linear layer in its blocks, so there is nothing to quantize",
            do="use quantizer none",
        )
    for site in sites:
        _replace(site, pack(site.weight()))
    return len(sites)


def _replace(site: Site, packing: Packing) -> None:
    old = site.weight_parameter
    weight = PackedWeight(packing, old.dtype, transposed=site.transposed)
    site.module.register_parameter("weight", nn.Parameter(weight, requires_grad=False))


def stored_bytes(tensor: Tensor) -> int:
    """Bytes that a parameter takes in memory."""
    return tensor.packing.nbytes if isinstance(tensor, PackedWeight) else tensor.nbytes
