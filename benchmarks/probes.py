"""What the machine gives right now: matrix rates and memory bandwidth, measured in the process that asks.

A shared machine changes its speed from minute to minute. Each benchmark process probes before and after its work; a
figure is comparable with another when their probes agree.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from devices import Device

SIDE = 2048
BANDWIDTH_BYTES = 128 * 2**20


def probe(precision: str, device: Device, *, widest: tuple[int, int], seconds: float = 0.5) -> dict[str, float]:
    """GFLOP/s of a square product and of the model's widest one, and GB/s of a copy (bytes read plus written)."""
    dtype = getattr(torch, precision)
    return {
        "gemm_gflops": _matrix_rate(dtype, device, (SIDE, SIDE), seconds),
        "block_gflops": _matrix_rate(dtype, device, widest, seconds),
        "copy_gb_per_s": _copy_rate(device, seconds),
    }


def native(device: str) -> str:
    """The precision that this device multiplies natively; imitated bfloat16 products take a hundred times as long."""
    if device == "cuda":
        return "bfloat16"
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if fast else "float32"


def _matrix_rate(dtype: torch.dtype, device: Device, sizes: tuple[int, int], seconds: float) -> float:
    inputs, outputs = sizes
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(SIDE, inputs, generator=draw).to(device.name, dtype)
    weight = torch.randn(outputs, inputs, generator=draw).to(device.name, dtype)
    median = _median_time(lambda: F.linear(x, weight), device, seconds)
    return round(2 * SIDE * inputs * outputs / median / 1e9, 1)


def _copy_rate(device: Device, seconds: float) -> float:
    source = torch.ones(BANDWIDTH_BYTES // 4, device=device.name)
    target = torch.empty_like(source)
    return round(2 * source.nbytes / _median_time(lambda: target.copy_(source), device, seconds) / 1e9, 1)


def _median_time(call: Callable[[], object], device: Device, seconds: float) -> float:
    call()
    device.settle()
    times: list[float] = []
    while sum(times) < seconds:
        started = time.perf_counter()
        call()
        device.settle()
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]
