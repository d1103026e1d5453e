"""The operations of a block in C++, for CPUs: one pass over memory each, and attention that stays in the caches.

Idea: what torch does in five passes over float32 copies is one pass here, in the precision the numbers are kept in; and
a text's attention is products of a size that a core's cache holds. See native/*.cpp for how.
Cost: memory bandwidth for the row operations; attention runs at about half the rate of large products.
Use when: float32 or bfloat16 on a CPU with a compiler. Not when: float64, or another device; the twin does those.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Final, final

import torch
from jaxtyping import Float, Int, Int8, UInt8
from torch import Tensor

from luthier.kernels import many, native_build, native_codes
from luthier.kernels.addresses import nowhere
from luthier.kernels.backend import Backend, BareBlock, Paged, PairCodes, Run, Seen, TokenBlocks
from luthier.kernels.halves import (
    multiplies_halves,
    product_by_library,
    product_of_many_bytes,
    product_of_many_codes,
)
from luthier.kernels.many import FEW, Summand
from luthier.kernels.native_tokens import ARGUMENTS, EVERYTHING, NativeTokenBlocks, is_bare
from luthier.kernels.thin import ThinRows, ThinTerms, add_gathered
from luthier.kernels.torch_backend import (
    attended_by_text,
    bytes_unpacked_and_multiplied,
    codes_unpacked_and_multiplied,
    unpacked_pairs,
)

_POINTER, _WHOLE, _REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURES: Final[dict[str, tuple[Any, ...]]] = {
    "norm": (*[_POINTER] * 4, _WHOLE, _WHOLE, _REAL, _WHOLE),
    "norm_backward": (*[_POINTER] * 6, _WHOLE, _WHOLE),
    "gated": (*[_POINTER] * 3, _WHOLE),
    "gated_backward": (*[_POINTER] * 5, _WHOLE),
    "rotated": (*[_POINTER] * 4, _WHOLE, _WHOLE, _WHOLE, _REAL),
    "unpacked": (*[_POINTER] * 4, _WHOLE, _WHOLE),
    "unpacked_rows": (*[_POINTER] * 3, _WHOLE, _WHOLE),
    "thin": (*[_POINTER] * 8, _WHOLE, _WHOLE, _WHOLE),
    "label_slopes": (*[_POINTER] * 3, _WHOLE, _WHOLE, _WHOLE),
    "best": (*[_POINTER] * 3, _WHOLE, _WHOLE),
    "attend": (*[_POINTER] * 8, *[_WHOLE] * 5, _REAL),
    "attend_backward": (*[_POINTER] * 12, *[_WHOLE] * 5, _REAL),
    "attend_pages": (*[_POINTER] * 7, *[_WHOLE] * 6, _REAL, _WHOLE),
    "token_blocks": ARGUMENTS,
    "products": (*[_POINTER] * 10, *[_WHOLE] * 5),
    "product_sums": (*[_POINTER] * 3, *[_WHOLE] * 4),
    "product_crossed": (*[_POINTER] * 3, *[_WHOLE] * 8),
    "products_of_bytes": (*[_POINTER] * 10, *[_WHOLE] * 5),
    "products_of_codes": (*[_POINTER] * 7, *[_WHOLE] * 5),
}
"""The arguments of each function; its name ends in a precision."""
_PRECISIONS: Final = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_HALVES: Final = {torch.bfloat16: "bfloat16"}
_OF_HALVES: Final = ("product_sums", "product_crossed")
_TELLS: Final = ("attend", "product", "token")
"""Functions whose names begin so say whether there was memory for them."""


@final
class NativeBackend(Backend):
    """C++ on the threads that torch uses."""

    def __init__(self, functions: dict[tuple[str, torch.dtype], Any], built_as: str) -> None:
        self._functions = functions
        self._built_as = built_as

    @classmethod
    def build(cls) -> NativeBackend:
        """Compile and load. Raises MissingError when that is not possible here."""
        loaded, built_as = native_build.library(native_build.SOURCES, native_build.FLAGS)
        functions: dict[tuple[str, torch.dtype], Any] = {}
        for name, arguments in _SIGNATURES.items():
            for dtype, ending in _HALVES.items() if name in _OF_HALVES else _PRECISIONS.items():
                function = loaded[f"{name}_{ending}"]
                function.argtypes = arguments
                function.restype = ctypes.c_int if name.startswith(_TELLS) else None
                functions[name, dtype] = function
        return cls(functions, built_as)

    @property
    def name(self) -> str:
        return "native"

    @property
    def identity(self) -> str:
        return f"native {self._built_as}"

    def norm(
        self, x: Float[Tensor, "n d"], weight: Float[Tensor, " d"], eps: float
    ) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n 1"]]:
        inverse = torch.empty(x.shape[0], 1, dtype=torch.float32)
        return self._norm(x, weight, inverse, eps, known=False), inverse

    def normed(
        self, x: Float[Tensor, "n d"], weight: Float[Tensor, " d"], inverse: Float[Tensor, "n 1"]
    ) -> Float[Tensor, "n d"]:
        return self._norm(x, weight, inverse, 0.0, known=True)

    def norm_backward(
        self,
        grad: Float[Tensor, "n d"],
        x: Float[Tensor, "n d"],
        weight: Float[Tensor, " d"],
        inverse: Float[Tensor, "n 1"],
        added: Float[Tensor, "n d"] | None,
    ) -> Float[Tensor, "n d"]:
        grad, x = grad.contiguous(), x.contiguous()
        more = None if added is None else added.contiguous()
        out = torch.empty_like(x)
        self._call("norm_backward", x.dtype, grad, x, weight.to(x.dtype), inverse, more, out, *x.shape)
        return out

    def gated(self, gate: Float[Tensor, "n f"], up: Float[Tensor, "n f"]) -> Float[Tensor, "n f"]:
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        self._call("gated", gate.dtype, gate, up, out, gate.numel())
        return out

    def gated_backward(
        self, grad: Float[Tensor, "n f"], gate: Float[Tensor, "n f"], up: Float[Tensor, "n f"]
    ) -> tuple[Float[Tensor, "n f"], Float[Tensor, "n f"]]:
        grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
        grad_up = torch.empty_like(up)
        self._call("gated_backward", gate.dtype, grad, gate, up, grad, grad_up, gate.numel())
        return grad, grad_up

    def rotated(
        self, x: Float[Tensor, "n heads size"], cosines: Float[Tensor, "n half"], sines: Float[Tensor, "n half"]
    ) -> Float[Tensor, "n heads size"]:
        x, dtype = x.contiguous(), x.dtype
        out = torch.empty_like(x)
        angles = (cosines.to(dtype).contiguous(), sines.to(dtype).contiguous())
        self._call("rotated", dtype, x, *angles, out, *x.shape[:2], x.shape[2] // 2, 1.0)
        return out

    def label_slopes(
        self,
        logits: Float[Tensor, "n V"],
        labels: Int[Tensor, " n"],
        *,
        slopes: bool,
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, "n V"] | None]:
        logits = logits.contiguous()
        log_probs = torch.empty(len(logits), dtype=torch.float32)
        self._call("label_slopes", logits.dtype, logits, labels.contiguous(), log_probs, *logits.shape, slopes)
        return log_probs, logits if slopes else None

    def best(self, logits: Float[Tensor, "n V"]) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
        if logits.dtype not in _PRECISIONS or not logits.numel():
            return super().best(logits)
        logits = logits.contiguous()
        places = torch.empty(len(logits), dtype=torch.int64)
        normalisers = torch.empty(len(logits), dtype=torch.float32)
        self._call("best", logits.dtype, logits, places, normalisers, *logits.shape)
        return places, normalisers

    def unpacked(
        self,
        codes: UInt8[Tensor, " pairs"],
        scales: Float[Tensor, " blocks"],
        levels: Float[Tensor, 16],
        block: int,
        numbers: int,
        dtype: torch.dtype,
    ) -> Float[Tensor, " numbers"]:
        if dtype not in _PRECISIONS or block % 2:
            # Two blocks in one byte have no place in the C++.
            return unpacked_pairs(codes, scales, levels, block, numbers, dtype)
        out = torch.empty(numbers, dtype=dtype)
        self._call("unpacked", dtype, codes.contiguous(), scales.contiguous(), levels.contiguous(), out, numbers, block)
        return out

    def unpacked_rows(
        self, codes: Int8[Tensor, "out in"], scales: Float[Tensor, " out"], dtype: torch.dtype
    ) -> Float[Tensor, "out in"]:
        if dtype not in _PRECISIONS:
            return super().unpacked_rows(codes, scales, dtype)
        out = torch.empty(codes.shape, dtype=dtype)
        self._call("unpacked_rows", dtype, codes.contiguous(), scales.contiguous(), out, *codes.shape)
        return out

    def thin(self, x: Float[Tensor, "n in"], y: Float[Tensor, "n out"], terms: ThinTerms, rows: ThinRows) -> None:
        if not y.is_contiguous():
            add_gathered(x, y, terms, rows.short)
            return
        terms.reserve(rows.top)
        places = (terms.table, terms.scales, rows.tiles, rows.firsts, rows.numbers, rows.weights, len(rows.tiles))
        self._call("thin", x.dtype, x.contiguous(), y, *places, x.shape[1], y.shape[1])

    def attends(self, query: Float[Tensor, "n heads size"], seen: Seen | None) -> bool:
        return (seen is None or seen.starts is None) and query.dtype in _PRECISIONS and query.shape[-1] % 2 == 0

    def attend(
        self,
        query: Float[Tensor, "n heads size"],
        key: Float[Tensor, "m groups size"],
        value: Float[Tensor, "m groups size"],
        runs: Sequence[Run],
        scale: float,
        seen: Seen | None,
    ) -> tuple[Float[Tensor, "n heads size"], tuple[Tensor, ...]]:
        given = tuple(tensor.contiguous() for tensor in (query, key, value))
        out = torch.empty_like(given[0])
        log_sums = torch.empty(query.shape[:2], dtype=torch.float32)
        places = _places(runs, seen)
        self._call("attend", query.dtype, *given, out, log_sums, *places, *_sizes(query, key), scale)
        return out, (log_sums,)

    def attend_backward(
        self,
        grad: Float[Tensor, "n heads size"],
        query: Float[Tensor, "n heads size"],
        key: Float[Tensor, "m groups size"],
        value: Float[Tensor, "m groups size"],
        out: Float[Tensor, "n heads size"],
        kept: Sequence[Tensor],
        runs: Sequence[Run],
        scale: float,
        seen: Seen | None,
    ) -> tuple[Float[Tensor, "n heads size"], Float[Tensor, "m groups size"], Float[Tensor, "m groups size"]]:
        given = tuple(tensor.contiguous() for tensor in (grad, query, key, value, out))
        found = tuple(torch.empty_like(tensor) for tensor in given[1:4])
        places = _places(runs, seen)
        self._call("attend_backward", query.dtype, *given, kept[0], *found, *places, *_sizes(query, key), scale)
        return found[0], found[1], found[2]

    def attend_pages(
        self,
        query: Float[Tensor, "n heads size"],
        keys: Float[Tensor, "rows groups size"],
        values: Float[Tensor, "rows groups size"],
        texts: Paged,
        scale: float,
        window: int | None,
    ) -> Float[Tensor, "n heads size"]:
        contiguous = keys.is_contiguous() and values.is_contiguous()
        if query.dtype not in _PRECISIONS or keys.dtype != query.dtype or query.shape[-1] % 2 or not contiguous:
            return attended_by_text(query, keys, values, texts, scale, window)
        query = query.contiguous()
        out = torch.empty_like(query)
        places = tuple(each.contiguous() for each in (texts.pages, texts.counts, texts.starts))
        shape = (*texts.pages.shape, texts.size, *_sizes(query, keys))
        self._call("attend_pages", query.dtype, query, keys, values, out, *places, *shape, scale, window or EVERYTHING)
        return out

    def token_blocks(self, blocks: Sequence[BareBlock]) -> TokenBlocks | None:
        dtype = blocks[0].norms[0][0].dtype
        if dtype not in _PRECISIONS or not all(is_bare(each, dtype) for each in blocks):
            return None
        return NativeTokenBlocks(blocks, dtype, self._functions["token_blocks", dtype])

    def product(
        self, x: Float[Tensor, "n in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, "n out"]:
        return self.products(x, ((weight, bias),))[0]

    def products(
        self, x: Float[Tensor, "n in"], layers: Sequence[tuple[Tensor, Tensor | None]]
    ) -> list[Float[Tensor, "n _"]]:
        rows, size = x.shape
        few = [many.are_few(x, *layer) for layer in layers]
        if len(layers) > 3 or (len(layers) > 1 and not all(few)):
            return [self.product(x, *layer) for layer in layers]
        if not all(few):
            return [self._summed((Summand(x, weight),), bias) for weight, bias in layers]
        sizes = [weight.shape[0] for weight, _ in layers]
        found = [x.new_empty(rows, outs) for outs in sizes]
        given = [each for (weight, bias), y in zip(layers, found, strict=True) for each in (weight, bias, y)]
        missing = 3 - len(layers)
        x = x.contiguous()
        self._call("products", x.dtype, x, *given, *[None] * 3 * missing, rows, size, *sizes, *[0] * missing)
        return found

    def summed(
        self,
        parts: Sequence[Summand],
        bias: Float[Tensor, " out"] | None = None,
        *,
        out: Float[Tensor, "n out"] | None = None,
    ) -> Float[Tensor, "n out"]:
        if out is None and len(parts) == 1 and not parts[0].across:
            return self.product(parts[0].x, parts[0].weight, bias)
        return self._summed(parts, bias, out)

    def _summed(
        self, parts: Sequence[Summand], bias: Tensor | None, out: Tensor | None = None
    ) -> Float[Tensor, "n out"]:
        rows = len(parts[0].x)
        if rows <= FEW or not many.multiplies_many() or not many.are_taken(parts, bias, out):
            return many.by_library(parts, bias, out, self.product if len(parts) > 1 else product_by_library)
        y = out if out is not None else parts[0].x.new_empty(rows, many.outs_of(parts[0]))
        self._call("product_sums", y.dtype, many.laid_out(parts), bias, y, len(parts), y.stride(0), *y.shape)
        return y

    def crossed(
        self, left: Float[Tensor, "n p"], right: Float[Tensor, "n q"], dtype: torch.dtype
    ) -> Float[Tensor, "p q"]:
        (rows, high), wide = left.shape, right.shape[1]
        narrow = rows > FEW and min(high, wide) <= many.NARROW and dtype in (torch.float32, left.dtype)
        if not narrow or not many.multiplies_many() or not many.lie_plain(left, right):
            return super().crossed(left, right, dtype)
        found = torch.empty(high, wide, dtype=dtype)
        one, other, steps = (left, right, (wide, 1)) if high <= wide else (right, left, (1, wide))
        sizes = (one.stride(0), other.stride(0), *steps, rows, one.shape[1], other.shape[1], dtype == left.dtype)
        self._call("product_crossed", left.dtype, one, other, found, *sizes)
        return found

    @property
    def few(self) -> int:
        return FEW

    def multiplies_packed(self, rows: int, dtype: torch.dtype) -> bool:
        # Many rows by floats in pieces, where a library's product of bfloat16 numbers would be imitated.
        return rows > 0 and (rows <= many.few_rows(dtype) or not multiplies_halves())

    def multiplies_bytes(self, rows: int, dtype: torch.dtype) -> bool:
        return 0 < rows <= many.few_rows_of_bytes(dtype) or self.multiplies_packed(rows, dtype)

    def product_of_bytes(
        self, x: Float[Tensor, "n in"], codes: Int8[Tensor, "out in"], scales: Float[Tensor, " out"]
    ) -> Float[Tensor, "n out"]:
        (rows, size), outs = x.shape, codes.shape[0]
        if not rows or x.dtype not in _PRECISIONS:
            return bytes_unpacked_and_multiplied(x, codes, scales)
        if rows > many.few_rows_of_bytes(x.dtype) and not multiplies_halves():
            return product_of_many_bytes(x, codes, scales)
        out = x.new_empty(rows, outs)
        given = (x.contiguous(), codes.contiguous(), scales.contiguous())
        self._call("products_of_bytes", x.dtype, *given, out, *[None] * 6, rows, size, outs, 0, 0)
        return out

    def product_of_codes(self, x: Float[Tensor, "n in"], weight: PairCodes) -> Float[Tensor, "n out"]:
        (rows, size), outs, block = x.shape, weight.shape[0], weight.block
        if not rows or x.dtype not in _PRECISIONS or not native_codes.are_taken(weight):
            return codes_unpacked_and_multiplied(x, weight)
        if rows > FEW and not multiplies_halves():
            each = weight.scales.each()

            def numbers(first: int, last: int) -> Float[Tensor, " numbers"]:
                own = each[first // block : -(-last // block)]
                return self.unpacked(weight.codes[first // 2 :], own, weight.levels, block, last - first, torch.float32)

            return product_of_many_codes(x, outs, block, numbers)
        out, pairs = x.new_empty(rows, outs), native_codes.laid_out(weight)
        given = (x.contiguous(), ctypes.addressof(pairs), out)
        self._call("products_of_codes", x.dtype, *given, *[None] * 4, rows, size, outs, 0, 0)
        return out

    def _norm(self, x: Tensor, weight: Tensor, inverse: Tensor, eps: float, *, known: bool) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        self._call("norm", x.dtype, x, weight.to(x.dtype).contiguous(), out, inverse, *x.shape, eps, known)
        return out

    def _call(self, name: str, dtype: torch.dtype, *arguments: Any) -> None:
        """Call a function with pointers for tensors; they live at least as long as the call."""
        plain = [each.data_ptr() or nowhere(each) if isinstance(each, Tensor) else each for each in arguments]
        if self._functions[name, dtype](*plain):
            raise torch.OutOfMemoryError(f"no memory for the workspace of {name} in C++")


def _places(runs: Sequence[Run], seen: Seen | None) -> tuple[Tensor, Tensor | None, Tensor | None, int, int]:
    """Where each text begins, and where the last one ends; ranges of what they see, by text; texts; rows outside."""
    lengths = [length for count, length in runs for _ in range(count)]
    starts = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
    if seen is None:
        return starts, None, None, len(lengths), 0
    firsts = torch.tensor([0, *map(len, seen.ranges)], dtype=torch.int64).cumsum(0)
    ranges = torch.tensor([row for own in seen.ranges for row in own], dtype=torch.int64).reshape(-1, 2)
    return starts, firsts, ranges, len(lengths), seen.outside


def _sizes(query: Float[Tensor, "n heads size"], key: Float[Tensor, "m groups size"]) -> tuple[int, int, int]:
    """Query heads, key heads, and the size of a head."""
    return query.shape[1], key.shape[1], query.shape[2]
