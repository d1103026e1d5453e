"""What the machine gives right now: the matrix rate and the memory bandwidth, measured in the process that asks.

A shared machine changes its speed from minute to minute. Each benchmark process probes before and after its work; a
figure is comparable with another when their probes agree.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

SIDE = 2048
BANDWIDTH_BYTES = 128 * 2**20


def probe(precision: str, *, seconds: float = 0.5) -> dict[str, float]:
    """GFLOP/s of a square product in this precision, and GB/s of a copy (bytes read plus bytes written)."""
    return {"gemm_gflops": _matrix_rate(getattr(torch, precision), seconds), "copy_gb_per_s": _copy_rate(seconds)}


def native() -> str:
    """The precision that this CPU multiplies natively; imitated bfloat16 products take a hundred times as long."""
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if fast else "float32"


def _matrix_rate(dtype: torch.dtype, seconds: float) -> float:
    x = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0)).to(dtype)
    return round(2 * SIDE**3 / _median_time(lambda: F.linear(x, x), seconds) / 1e9, 1)


def _copy_rate(seconds: float) -> float:
    source = torch.ones(BANDWIDTH_BYTES // 4)
    target = torch.empty_like(source)
    return round(2 * source.nbytes / _median_time(lambda: target.copy_(source), seconds) / 1e9, 1)


def _median_time(call: Callable[[], object], seconds: float) -> float:
    call()
    times: list[float] = []
    while sum(times) < seconds:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]
