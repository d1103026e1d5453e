"""Blocks that follow each other in one call of C++, when a few tokens are made over kept keys.

Idea: between the products of a few rows the way from Python to C++ and back takes as long as a small product. What does
not change from token to token, the weights and shapes of all blocks, is laid out once, as C++ reads it; a pass hands
over the rest. See native/block.cpp.
Cost: the workspace of one block, for one pass.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from luthier.kernels.backend import (
    AddedTerms,
    BareBlock,
    Codes,
    KeptRows,
    Norm,
    Paged,
    PairCodes,
    RowCodes,
    TokenBlocks,
)
from luthier.kernels.many import few_rows
from luthier.kernels.native_codes import LaidOutPairs, address, are_taken, laid_out

EVERYTHING: Final = 2**62
"""The window of a token that sees all that is before it."""
_POINTER, _WHOLE = ctypes.c_void_p, ctypes.c_int64
ARGUMENTS: Final = (*[_POINTER] * 14, *[_WHOLE] * 6)
"""What the function takes: pointers, then counts."""
_LAYERS: Final = 7


class _Block(ctypes.Structure):
    """A block as C++ reads it: four pointers a layer (numbers or codes of eight bits, scales of these, `LaidOutPairs`,
    bias), its norms, and its numbers."""

    _fields_ = (
        ("layers", _POINTER * (4 * _LAYERS)), ("norms", _POINTER * 4), ("heads", _WHOLE), ("groups", _WHOLE),
        ("head", _WHOLE), ("inner", _WHOLE), ("window", _WHOLE), ("eps", ctypes.c_float * 3), ("scale", ctypes.c_float),
    )  # fmt: skip


class _Group(ctypes.Structure):
    """Where new keys of a group's layers go, and the texts in them, as C++ reads it."""

    _fields_ = (("rows", _POINTER), ("pages", _POINTER), ("counts", _POINTER), ("most", _WHOLE))


@final
class NativeTokenBlocks(TokenBlocks):
    """Bare blocks of one precision, by the C++ of that precision."""

    def __init__(self, blocks: Sequence[BareBlock], dtype: torch.dtype, function: Any) -> None:
        self._blocks = tuple(blocks)  # whose memory the pointers are of
        self._dtype = dtype
        self._function = function
        self._pairs = {id(weight): laid_out(weight) for weight in _weights(blocks) if isinstance(weight, PairCodes)}
        self._laid_out = (_Block * len(blocks))(*(_laid_out(each, self._pairs) for each in blocks))

    @property
    def most(self) -> int:
        return few_rows(self._dtype)

    def through(
        self,
        x: Float[Tensor, "n d"],
        which: range,
        angles: tuple[Float[Tensor, "n half"], Float[Tensor, "n half"]],
        kept: KeptRows,
        added: AddedTerms | None,
    ) -> Float[Tensor, "n d"] | None:
        given = (x, *angles, *kept.keys, *kept.values)
        if not 0 < len(x) <= self.most or not all(each.dtype == self._dtype and each.is_contiguous() for each in given):
            return None
        alike = all(own.shape == other.shape for own, other in zip(kept.keys, kept.values, strict=True))
        if not alike or (added is not None and not _fit(added, len(x))):
            return None
        out, texts = torch.empty_like(x), kept.texts[0]
        sides = [pair for both in zip(kept.keys, kept.values, strict=True) for pair in both]
        held = (_POINTER * len(sides))(*map(Tensor.data_ptr, sides))
        groups = (_Group * len(kept.rows))(*map(_group, kept.rows, kept.texts))
        of = (_WHOLE * len(which))(*kept.of)
        rows = None if added is None else added.rows.together
        terms = None if added is None else _table(added)
        tiles = (None,) * 4 if rows is None else (rows.tiles, rows.firsts, rows.numbers, rows.weights)
        tensors = (x, out, *angles, texts.starts, *tiles)
        pointers = [None if each is None else address(each) for each in tensors]
        first = ctypes.addressof(self._laid_out) + which.start * ctypes.sizeof(_Block)
        counts = (len(which), *x.shape, len(texts.counts), texts.size, 0 if rows is None else len(rows.tiles))
        if self._function(first, held, groups, of, terms, *pointers, *counts):
            raise torch.OutOfMemoryError("no memory for the workspace of token_blocks in C++")
        return out


def is_bare(block: BareBlock, dtype: torch.dtype) -> bool:
    """Whether the C++ takes a block: numbers of one precision, as they lie, and shapes that it knows."""
    norms = (*block.norms, *(block.head_norms or ()))
    # Of the norms of heads C++ has one number for both.
    eps = {own for _, own in block.head_norms or ()}
    return (
        all(weight.dtype == dtype and weight.is_contiguous() for weight, _ in norms) and len(eps) < 2
        and block.head_size % 2 == 0 and all(_is_plain(*each, dtype) for each in block.layers)
    )  # fmt: skip


def _weights(blocks: Sequence[BareBlock]) -> Iterator[Tensor | Codes]:
    for block in blocks:
        yield from (weight for weight, _ in block.layers)


def _is_plain(weight: Tensor | Codes, bias: Tensor | None, dtype: torch.dtype) -> bool:
    if bias is not None and bias.dtype != dtype:
        return False
    if isinstance(weight, PairCodes):
        return are_taken(weight)
    if isinstance(weight, RowCodes):
        return weight.codes.is_contiguous() and weight.scales.is_contiguous()
    return type(weight) in (nn.Parameter, Tensor) and weight.is_contiguous() and weight.dtype == dtype


def _laid_out(block: BareBlock, pairs: Mapping[int, LaidOutPairs]) -> _Block:
    layers = [pointer for weight, bias in block.layers for pointer in _layer(weight, bias, pairs)]
    outs = [_outs(weight) for weight, _ in block.layers]
    none: tuple[Norm | None, Norm | None] = (None, None)
    norms = (*block.norms, *(block.head_norms or none))
    found = _Block(heads=outs[0] // block.head_size, groups=outs[1] // block.head_size, head=block.head_size)
    found.layers[:] = layers
    found.norms[:] = [None if each is None else address(each[0]) for each in norms]
    found.eps[:] = [0.0 if each is None else each[1] for each in norms[:3]]
    found.inner, found.scale, found.window = outs[4], block.scale, block.window or EVERYTHING
    return found


def _group(rows: Tensor, texts: Paged) -> _Group:
    return _Group(address(rows), address(texts.pages), address(texts.counts), texts.pages.shape[1])


def _layer(
    weight: Tensor | Codes, bias: Tensor | None, pairs: Mapping[int, LaidOutPairs]
) -> tuple[int | None, int | None, int | None, int | None]:
    if isinstance(weight, PairCodes):
        return None, None, ctypes.addressof(pairs[id(weight)]), address(bias)
    if isinstance(weight, RowCodes):
        return address(weight.codes), address(weight.scales), None, address(bias)
    return address(weight), None, None, address(bias)


def _outs(weight: Tensor | Codes) -> int:
    if isinstance(weight, PairCodes):
        return weight.shape[0]
    return len(weight.codes if isinstance(weight, RowCodes) else weight)


def _fit(added: AddedTerms, rows: int) -> bool:
    """Whether the C++ takes these terms; their tables then have a place for each number."""
    own = added.rows.together
    terms = [each for block in added.terms for each in block if each is not None]
    if own.stop > rows:
        return False
    for each in terms:
        each.reserve(own.top)
    return True


def _table(added: AddedTerms) -> Any:
    """Two pointers for each layer of each block: where its terms lie, and their scales."""
    pointers: list[int | None] = []
    for each in (own for block in added.terms for own in block):
        pointers += (None, None) if each is None else (each.table.data_ptr(), each.scales.data_ptr())
    return (_POINTER * len(pointers))(*pointers)
