"""What this machine can do: the rate of matrix products and the bandwidth of memory, measured and remembered.

Idea: a limit is what the machine has shown at its best. A first run measures for a third of a second, at the shape of
its own products; later ones take the number from the cache. `luthier doctor` measures anew and keeps the better one,
and so do a few later runs where the processors had other work while it was measured.
The same numbers decide in which precision a CPU computes: half precision is twice as fast on one and a hundred times
slower on another, and depends on the shape.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from luthier.core.paths import cache_folder
from luthier.store.environment import processor
from luthier.store.remembered import recalled, remember

FILE = "machine.json"
SECONDS = 0.25
MOST_TOKENS = 2048
MOST_FLOPS = 2e10
"""FLOPs of one product that is timed: a tenth of a second on a small machine."""
COPIED = 64 * 2**20
MOST_NUMBERS = 2**27
"""Numbers of a matrix that is timed: half a gigabyte. A product with a larger one is no faster, and may not fit."""
QUIET = 0.8
"""Share of the time of all threads that is ours where nothing else runs: 0.97 to 1.0 were seen, 0.6 beside one loop."""
MOST_BUSY = 8
"""Times that a busy machine is measured: one that always is should not be measured by each run."""


@dataclass(frozen=True)
class Rates:
    """FLOPs a second of products, and bytes a second (read plus written) of a copy.

    `busy` is how often they were measured, where that was beside other work each time; 0 where it was not.
    """

    flops: float
    bytes: float
    busy: int = 0


def rates(device: torch.device, dtype: torch.dtype, *, inputs: int, outputs: int, anew: bool = False) -> Rates:
    """The best rates seen here for products of this shape; measured when there are none, or `anew`."""
    key = " ".join([_name(device), f"{torch.get_num_threads()} threads", f"torch {torch.__version__}",
                    str(dtype).removeprefix("torch."), f"{inputs}x{outputs}"])  # fmt: skip
    path = cache_folder() / FILE
    known = recalled(path)
    seen = _rates(known.get(key))
    if seen is not None and not anew and not 0 < seen.busy < MOST_BUSY:
        return seen
    now = measure(device, dtype, inputs=inputs, outputs=outputs)
    best = now if seen is None else _better(seen, now)
    remember(path, {**known, key: asdict(best)})
    return best


def _better(one: Rates, other: Rates) -> Rates:
    busy = one.busy + other.busy if one.busy and other.busy else 0
    return Rates(max(one.flops, other.flops), max(one.bytes, other.bytes), busy)


def measure(device: torch.device, dtype: torch.dtype, *, inputs: int, outputs: int, seconds: float = SECONDS) -> Rates:
    """The rates now: the best of as many tries as fit into `seconds`."""
    inputs, outputs = _timed_sizes(inputs, outputs)
    tokens = max(64, min(MOST_TOKENS, int(MOST_FLOPS / (2 * inputs * outputs))))
    x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    source = torch.ones(COPIED // 4, device=device)
    target = torch.empty_like(source)
    with torch.no_grad():
        begun, ours = time.perf_counter(), time.process_time()
        product = _best(lambda: F.linear(x, weight), device, seconds)
        share = (time.process_time() - ours) / (time.perf_counter() - begun) / torch.get_num_threads()
        copied = _best(lambda: target.copy_(source), device, seconds / 3)
    busy = int(device.type == "cpu" and share < QUIET)
    return Rates(2 * tokens * inputs * outputs / product, 2 * source.nbytes / copied, busy)


def _timed_sizes(inputs: int, outputs: int) -> tuple[int, int]:
    """The sizes of a matrix that is as large as one is timed, the longer side shortened first."""
    shorter = min(inputs, outputs, math.isqrt(MOST_NUMBERS))
    longer = min(max(inputs, outputs), MOST_NUMBERS // shorter)
    return (longer, shorter) if inputs > outputs else (shorter, longer)


def _best(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The shortest time of a call, in seconds."""
    _timed(call, device)
    times = [_timed(call, device)]
    while sum(times) < seconds:
        times.append(_timed(call, device))
    return min(times)


def _timed(call: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def _rates(value: object) -> Rates | None:
    if not isinstance(value, dict):
        return None
    # Before it was told whether the machine was busy, it may have been.
    flops, traffic, busy = value.get("flops"), value.get("bytes"), value.get("busy", 1)
    if isinstance(flops, float) and isinstance(traffic, float) and flops > 0 and traffic > 0 and type(busy) is int:
        return Rates(flops, traffic, max(0, busy))
    return None
