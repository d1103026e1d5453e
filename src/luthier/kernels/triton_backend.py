"""The operations of a block for GPUs: Triton kernels between the products, torch's varlen attention.

Idea: a GPU's memory is read once for each operation where torch's own operations would read it three to six times, and
rows may lie apart, so that a slice of a joined product is not copied. The kernels are in triton_rows.py; this file
chooses their tiles. Triton comes with torch's builds for CUDA; it is imported when this backend is built, not before.
Cost: memory bandwidth for the row operations; attention as in varlen.py.
Use when: float32 or bfloat16 on a CUDA device. Not when: float64; the twin does that.
The kernels are tested in Triton's interpreter and compiled for sm_80, sm_90 and sm_100; not yet run on a GPU.
"""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int8, UInt8
from torch import Tensor

from luthier.core.errors import MissingError
from luthier.core.optional import require
from luthier.kernels import varlen
from luthier.kernels.backend import Backend, Paged, PairCodes, Run, Seen
from luthier.kernels.thin import ThinRows, ThinTerms, add_gathered
from luthier.kernels.torch_backend import (
    attended_by_text,
    bytes_unpacked_and_multiplied,
)

NUMBERS = 2048
"""Numbers of each tensor in a tile of short rows: 16 for each thread of four warps, so that registers last."""
LONGEST_PART = 1024
"""The most columns of a tile where columns need not be seen together."""
VOCABULARY_PART = 8192
"""Columns of a row of logits at a time: a chunk of rows is hardly more programs than a GPU has multiprocessors, so each
of them has to have much in flight."""


@dataclass(frozen=True)
class Tile:
    """What one program works on at a time, powers of two, and on how many warps."""

    rows: int
    width: int
    warps: int

    @classmethod
    def of_rows(cls, width: int, *, longest: int | None = None) -> Tile:
        """The tile for rows of `width` numbers: whole ones, or parts of at most `longest`."""
        padded = _power_of_two(width if longest is None else min(width, longest))
        rows = max(1, NUMBERS // padded)
        return cls(rows, padded, _warps(rows * padded))


@final
class TritonBackend(Backend):
    """Triton kernels, launched from torch's tensors."""

    def __init__(self, kernels: ModuleType) -> None:
        self._kernels = kernels
        self._finder = varlen.Finder()

    @classmethod
    def build(cls, device: torch.device, dtype: torch.dtype) -> TritonBackend:
        """Import the kernels and try one on `device`. Raises MissingError when Triton is not there or cannot run."""
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise MissingError(
                f"Triton kernels run on a GPU, and the model is on {device.type}",
                do="leave LUTHIER_KERNELS out; for tests, TRITON_INTERPRET=1 runs them on a CPU, very slowly",
            )
        require("triton.language", extra="gpu", purpose="LUTHIER_KERNELS=triton")
        from luthier.kernels import triton_rows

        made = cls(triton_rows)
        made._try_one(device, dtype)
        return made

    @property
    def name(self) -> str:
        return "triton"

    @property
    def identity(self) -> str:
        return f"triton {self._kernels.triton.__version__}"

    def norm(
        self, x: Float[Tensor, "n d"], weight: Float[Tensor, " d"], eps: float
    ) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n 1"]]:
        inverse = _new(x, len(x), 1, dtype=torch.float32)
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
        grad, x = _rows(grad), _rows(x)
        more = grad if added is None else _rows(added)
        n, d = x.shape
        out, tile = _new(x, n, d), Tile.of_rows(d)
        self._run(
            "norm_backward", x, (_parts(n, tile.rows),), tile.warps,
            grad, x, weight.contiguous(), inverse, more, out, n, d, grad.stride(0), x.stride(0), more.stride(0),
            added is not None, tile.rows, tile.width,
        )  # fmt: skip
        return out

    def gated(self, gate: Float[Tensor, "n f"], up: Float[Tensor, "n f"]) -> Float[Tensor, "n f"]:
        gate, up = _rows(gate), _rows(up)
        n, f = gate.shape
        out, tile = _new(gate, n, f), Tile.of_rows(f, longest=LONGEST_PART)
        self._run(
            "gated", gate, (_parts(n, tile.rows), _parts(f, tile.width)), tile.warps,
            gate, up, out, n, f, gate.stride(0), up.stride(0), tile.rows, tile.width,
        )  # fmt: skip
        return out

    def gated_backward(
        self, grad: Float[Tensor, "n f"], gate: Float[Tensor, "n f"], up: Float[Tensor, "n f"]
    ) -> tuple[Float[Tensor, "n f"], Float[Tensor, "n f"]]:
        grad, gate, up = grad.contiguous(), _rows(gate), _rows(up)
        n, f = gate.shape
        grad_up, tile = _new(up, n, f), Tile.of_rows(f, longest=LONGEST_PART)
        self._run(
            "gated_backward", gate, (_parts(n, tile.rows), _parts(f, tile.width)), tile.warps,
            grad, gate, up, grad_up, n, f, gate.stride(0), up.stride(0), tile.rows, tile.width,
        )  # fmt: skip
        return grad, grad_up

    def rotated(
        self, x: Float[Tensor, "n heads size"], cosines: Float[Tensor, "n half"], sines: Float[Tensor, "n half"]
    ) -> Float[Tensor, "n heads size"]:
        x, cosines, sines = _rows(x), _rows(cosines), _rows(sines)
        n, heads, size = x.shape
        out, tile = _new(x, n, heads, size), Tile.of_rows(size // 2)
        self._run(
            "rotated", x, (_parts(n * heads, tile.rows),), tile.warps,
            x, cosines, sines, out, n, heads, size // 2, x.stride(0), x.stride(1), cosines.stride(0), sines.stride(0),
            tile.rows, tile.width,
        )  # fmt: skip
        return out

    def label_slopes(
        self,
        logits: Float[Tensor, "n V"],
        labels: Int[Tensor, " n"],
        *,
        slopes: bool,
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, "n V"] | None]:
        logits = _rows(logits)
        n, size = logits.shape
        log_probs = _new(logits, n, dtype=torch.float32)
        width = min(VOCABULARY_PART, _power_of_two(size))
        self._run(
            "label_slopes", logits, (n,), _warps(width),
            logits, labels.contiguous(), log_probs, size, logits.stride(0), slopes, width,
        )  # fmt: skip
        return log_probs, logits if slopes else None

    def unpacked(
        self,
        codes: UInt8[Tensor, " pairs"],
        scales: Float[Tensor, " blocks"],
        levels: Float[Tensor, 16],
        block: int,
        numbers: int,
        dtype: torch.dtype,
    ) -> Float[Tensor, " numbers"]:
        out, width = _new(scales, numbers, dtype=dtype), NUMBERS // 2
        self._run(
            "unpacked", out, (_parts(numbers, NUMBERS),), _warps(NUMBERS),
            codes.contiguous(), scales.contiguous(), levels, out, numbers, block, width,
        )  # fmt: skip
        return out

    def unpacked_rows(
        self, codes: Int8[Tensor, "out in"], scales: Float[Tensor, " out"], dtype: torch.dtype
    ) -> Float[Tensor, "out in"]:
        n, d = codes.shape
        out, tile = _new(scales, n, d, dtype=dtype), Tile.of_rows(d, longest=LONGEST_PART)
        self._run(
            "unpacked_rows", out, (_parts(n, tile.rows), _parts(d, tile.width)), tile.warps,
            codes.contiguous(), scales.contiguous(), out, n, d, tile.rows, tile.width,
        )  # fmt: skip
        return out

    def thin(self, x: Float[Tensor, "n in"], y: Float[Tensor, "n out"], terms: ThinTerms, rows: ThinRows) -> None:
        add_gathered(x, y, terms, rows.short)

    def attends(self, query: Float[Tensor, "n heads size"], seen: Seen | None) -> bool:
        return varlen.allowed(query)

    def attend(
        self,
        query: Float[Tensor, "n heads size"],
        key: Float[Tensor, "m groups size"],
        value: Float[Tensor, "m groups size"],
        runs: Sequence[Run],
        scale: float,
        seen: Seen | None,
    ) -> tuple[Float[Tensor, "n heads size"], tuple[Tensor, ...]]:
        out, log_sums = varlen.attend(query, key, value, self._finder.places(runs, seen, query.device), scale)
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
        places = self._finder.places(runs, seen, query.device)
        return varlen.attend_backward(grad, query, key, value, out, kept[0], places, scale)

    def _try_one(self, device: torch.device, dtype: torch.dtype) -> None:
        """Run the smallest kernel once: Triton needs a compiler for its launcher, and a GPU that it knows."""
        x = torch.ones(1, 2, dtype=dtype, device=device)
        fails = (RuntimeError, ImportError, OSError, subprocess.SubprocessError, self._kernels.triton.TritonError)
        try:
            self.gated(x, x)
        except torch.OutOfMemoryError:
            raise
        except fails as failure:
            words = str(failure).strip().splitlines()[:1] or [type(failure).__name__]
            raise MissingError(f"Triton kernels do not run on this {device.type} device: {words[0]}") from failure

    def _norm(self, x: Tensor, weight: Tensor, inverse: Tensor, eps: float, *, known: bool) -> Tensor:
        x = _rows(x)
        n, d = x.shape
        out, tile = _new(x, n, d), Tile.of_rows(d)
        self._run(
            "norm", x, (_parts(n, tile.rows),), tile.warps,
            x, weight.contiguous(), out, inverse, n, d, x.stride(0), eps, known, tile.rows, tile.width,
        )  # fmt: skip
        return out

    def attend_pages(
        self,
        query: Float[Tensor, "n heads size"],
        keys: Float[Tensor, "rows groups size"],
        values: Float[Tensor, "rows groups size"],
        texts: Paged,
        scale: float,
        window: int | None,
    ) -> Float[Tensor, "n heads size"]:
        return attended_by_text(query, keys, values, texts, scale, window)

    def product(
        self, x: Float[Tensor, "n in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, "n out"]:
        return F.linear(x, weight, bias)

    @property
    def few(self) -> int:
        return 0

    def product_of_bytes(
        self, x: Float[Tensor, "n in"], codes: Int8[Tensor, "out in"], scales: Float[Tensor, " out"]
    ) -> Float[Tensor, "n out"]:
        return bytes_unpacked_and_multiplied(x, codes, scales)

    def product_of_codes(self, x: Float[Tensor, "n in"], weight: PairCodes) -> Float[Tensor, "n out"]:
        numbers = math.prod(weight.shape)
        found = self.unpacked(weight.codes, weight.scales.each(), weight.levels, weight.block, numbers, x.dtype)
        return F.linear(x, found.view(weight.shape))

    def _run(self, name: str, on: Tensor, grid: tuple[int, ...], warps: int, *arguments: Any) -> None:
        """Launch a kernel on the device of `on`; nothing when the grid is empty."""
        if 0 in grid:
            return
        with torch.cuda.device_of(on):
            # Products and sums stay apart: then a GPU rounds as the interpreter does, in which the kernels are tested.
            vars(self._kernels)[name][grid](*arguments, num_warps=warps, enable_fp_fusion=False)


def _rows(tensor: Tensor) -> Tensor:
    """The tensor, each of its rows in one piece; a copy only when they are not."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _new(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=like.dtype if dtype is None else dtype, device=like.device)


def _parts(whole: int, part: int) -> int:
    return -(-whole // part)


def _power_of_two(least: int) -> int:
    return 1 << max(0, least - 1).bit_length()


def _warps(numbers: int) -> int:
    """Sixteen numbers a thread, in four warps at least and 32 at most."""
    return min(32, max(4, numbers // 512))
