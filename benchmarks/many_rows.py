"""Products of many rows, as a pass of training makes them: operations a second, ours and the library's.

    python benchmarks/many_rows.py

Shapes are those of a layer of the two prepared models, forward and back, of their low-rank factors, and of the
gradients of these. Each is multiplied in two ways: the same rows again and again, and another number of rows each time,
as micro-batches have them, for which a library makes code of its own. A layer with its low-rank term is one call of
ours and two of the library's. In bfloat16; medians of three looks, ours and the library's in turn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from counts import count
from torch import Tensor

from luthier.kernels import pool
from luthier.kernels.backend import Backend
from luthier.kernels.chosen import backend_for
from luthier.kernels.many import Summand
from luthier.kernels.pool import bound_caches
from luthier.kernels.torch_backend import TorchBackend

LAYERS = ((2700, 512, 1408), (2700, 1408, 512), (2700, 512, 512), (1400, 896, 4864), (1400, 4864, 896))
"""Rows, inputs and outputs."""
RANK = 16
TIMES = 12
"""Products of one look."""
Way = Callable[[Backend, int], Tensor]


def ways(rows: int, size: int, outs: int) -> dict[str, tuple[float, Way]]:
    """What is done with a layer: its name, FLOPs a row, and the doing of it for the first rows."""
    x, grad, low = (torch.randn(rows, wide).bfloat16() for wide in (size, outs, RANK))
    weight, up, down = (torch.randn(*shape).bfloat16() for shape in ((outs, size), (outs, RANK), (RANK, size)))
    both = 2.0 * (size * outs + RANK * outs)
    return {
        "forward": (both, lambda own, n: own.summed((Summand(x[:n], weight), Summand(low[:n], up)))),
        "back": (2.0 * size * (outs + RANK), lambda own, n: own.summed(
            (Summand(grad[:n], weight, True), Summand(low[:n], down, True)))),
        "A x": (2.0 * size * RANK, lambda own, n: own.summed((Summand(x[:n], down),))),
        "dA": (2.0 * size * RANK, lambda own, n: own.crossed(low[:n], x[:n], torch.float32)),
    }  # fmt: skip


def rate(way: Way, backend: Backend, work: float, rows: int, *, varied: bool) -> float:
    """GFLOP/s of so many products."""
    counts = [rows - 7 * index * varied for index in range(TIMES)]
    way(backend, counts[0] + 1)
    began = time.perf_counter()
    for each in counts:
        way(backend, each)
    return work * sum(counts) / 1e9 / (time.perf_counter() - began)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=count, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    bound_caches()
    pool.install()
    backend, missing = backend_for("auto", torch.device("cpu"), torch.bfloat16)
    print(f"{backend.identity} {missing}, {torch.get_num_threads()} threads, bfloat16, GFLOP/s")
    print(f"{'rows':>5} {'in':>5} {'out':>5} {'what':8} {'ours':>5} {'library':>8} {'rows vary: ours':>16} "
          f"{'library':>8}")  # fmt: skip
    both: tuple[Backend, Backend] = (backend, TorchBackend())
    with torch.no_grad():
        for rows, size, outs in LAYERS:
            for name, (work, way) in ways(rows + 1, size, outs).items():
                found = [[rate(way, own, work, rows, varied=varied) for varied in (False, True) for own in both]
                         for _ in range(3)]  # fmt: skip
                said = [statistics.median(each) for each in zip(*found, strict=True)]
                print(f"{rows:>5} {size:>5} {outs:>5} {name:8} {said[0]:5.0f} {said[1]:8.0f} {said[2]:16.0f} "
                      f"{said[3]:8.0f}", flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
