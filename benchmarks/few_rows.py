"""Products of a few rows with the matrices of Qwen2.5-0.5B's shape: bytes of weights read and operations a second.

    python benchmarks/few_rows.py
    python benchmarks/few_rows.py --threads 1

Each product has another matrix than the one before it, so that weights come from memory, and lies where the engine's
weights do (`kernels/pool.py`). The library's own product of the same tensors stands beside ours, and how many times as
fast ours is with whole numbers of eight bits as weights. The first line has what the cores can: the library's product
of 1,024 rows in float32. The best of five looks. One thread is timed by the processor time that it takes, which bears a
busy machine.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
from counts import count
from torch import Tensor

from luthier.kernels import pool
from luthier.kernels.chosen import backend_for

SHAPES = ((4864, 896), (896, 4864), (896, 896), (128, 896), (151936, 896))
ROWS = (1, 2, 4, 8, 12, 16, 32)
BYTES = 300 << 20
"""Of all matrices of a shape together: more than any cache holds."""


def seconds(product: Callable[[Tensor], Tensor], weights: list[Tensor]) -> float:
    """How long one product takes, at best."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    best = float("inf")
    for _ in range(5):
        began = clock()
        for weight in weights:
            product(weight)
        best = min(best, (clock() - began) / len(weights))
    return best


def limit() -> float:
    """GFLOP/s of a large product of floats."""
    x, weight = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return 2 * 1024**3 / 1e9 / seconds(lambda own: torch.nn.functional.linear(x, own), [weight] * 4)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=count, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    pool.install()
    backend, missing = backend_for("auto", torch.device("cpu"), torch.bfloat16)
    print(f"{backend.identity} {missing}, {torch.get_num_threads()} threads, bfloat16; floats {limit():.0f} GFLOP/s")
    print(f"{'weight':>14} {'rows':>4} {'GB/s':>6} {'GFLOP/s':>8} {'library GB/s':>13} {'int8 x':>6}")
    for outs, size in SHAPES:
        copies = max(1, BYTES // (2 * outs * size))
        weights = [torch.randn(outs, size).bfloat16() for _ in range(copies)]
        codes = [torch.randint(-127, 128, (outs, size), dtype=torch.int8) for _ in range(2 * copies)]
        scales = torch.rand(outs)
        for rows in ROWS:
            x = torch.randn(rows, size).bfloat16()
            with torch.no_grad():
                ours = seconds(lambda weight, x=x: backend.product(x, weight, None), weights)
                packed = seconds(lambda own, x=x, scales=scales: backend.product_of_bytes(x, own, scales), codes)
                theirs = seconds(lambda weight, x=x: torch.nn.functional.linear(x, weight), weights)
            moved, work = 2 * outs * size / 1e9, 2 * rows * outs * size / 1e9
            print(f"{outs:>7}x{size:<6} {rows:>4} {moved / ours:6.1f} {work / ours:8.0f} {moved / theirs:13.1f} "
                  f"{ours / packed:6.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
