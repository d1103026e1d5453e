"""How fast intruder dimensions are counted: the leading directions of W0 + B A beside two whole decompositions.

    python benchmarks/intruders.py --width 2048 --rank 16 --repeats 5

What: one square layer, a change of the given rank that is strong enough to have intruders. `whole` is the published
way: decompose base and tuned matrix, compare. `first look` decomposes the base once and keeps it; `later look` reads
what was kept, as every other adapter of that base does; with `control` it counts for a random change too. All ways must
give the same count. The spectrum is that of a trained layer if a safetensors file and a tensor's name are given.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from counts import above_zero, count

from luthier.maths.intruders import likeness, shuffled
from luthier.maths.spectra import Summed
from luthier.model.comparing.base_spectra import BaseSpectra
from luthier.model.files.tensor_files import load_tensors

K, EPSILON = 10, 0.5


def layer(width: int, place: str) -> torch.Tensor:
    """A matrix whose singular values fall like those of trained layers, or a real one: FILE:TENSOR."""
    if place:
        file, _, name = place.rpartition(":")
        return load_tensors(Path(file))[name].float()
    draws = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(width, width, generator=draws))[0] for _ in range(2))
    sizes = 10.0 * (1 + torch.arange(width, dtype=torch.float32)) ** -0.35
    return left * sizes @ right.t()


def published(weight: torch.Tensor, tuned: torch.Tensor) -> int:
    """Both matrices decomposed, the leading vectors of one beside all of the other's."""
    old = torch.linalg.svd(weight, full_matrices=False)[0]
    new = torch.linalg.svd(tuned, full_matrices=False)[0]
    return int(((old.t() @ new[:, :K]).abs().amax(0) < EPSILON).sum())


def timed(what: Callable[[], int], repeats: int) -> tuple[list[float], int]:
    """Seconds of each repeat, and the count."""
    found, count = [], 0
    for _ in range(repeats):
        begun = time.perf_counter()
        count = what()
        found.append(time.perf_counter() - begun)
    return found, count


def main() -> None:
    """Time each way, and compare."""
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--width", type=count, default=2048)
    arguments.add_argument("--rank", type=count, default=16)
    arguments.add_argument("--repeats", type=count, default=5)
    arguments.add_argument(
        "--strength", type=above_zero, default=1.5, help="norm of B A beside the base's largest value"
    )
    arguments.add_argument("--weight", default="", help="FILE:TENSOR of a real layer instead")
    given = arguments.parse_args()
    weight = layer(given.width, given.weight)
    draws = torch.Generator().manual_seed(1)
    down = torch.randn(given.rank, weight.shape[1], generator=draws) / math.sqrt(weight.shape[1])
    up = torch.randn(weight.shape[0], given.rank, generator=draws) / math.sqrt(weight.shape[0])
    up *= given.strength * float(torch.linalg.matrix_norm(weight, 2))
    tuned = weight + up @ down
    print(f"{weight.shape[0]} x {weight.shape[1]}, rank {given.rank}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}, median of {given.repeats}")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        kept, draw = BaseSpectra(Path(folder)), torch.Generator().manual_seed(2)

        def look(spectra: BaseSpectra, *, control: bool = False) -> int:
            base = spectra.of(weight)
            count = int(likeness(base, weight, Summed(weight, down, up), K, gap=0.01).intruders("left", EPSILON).sum())
            if control:
                likeness(base, weight, Summed(weight, *shuffled(down, up, draw)), K, gap=0.01)
            return count

        ways: dict[str, Callable[[], int]] = {
            "whole": lambda: published(weight, tuned),
            "first look": lambda: look(BaseSpectra(None)),
            "later look": lambda: look(kept),
            "with control": lambda: look(kept, control=True),
        }
        look(kept)
        results = {name: timed(way, given.repeats) for name, way in ways.items()}
    reference = statistics.median(results["whole"][0])
    for name, (seconds, intruders) in results.items():
        middle = statistics.median(seconds)
        spread = f"{min(seconds):.3f} to {max(seconds):.3f} s"
        print(f"{name:13} {middle:8.3f} s ({spread})  {reference / middle:6.1f} x  {intruders} intruders")
    if len({intruders for _, intruders in results.values()}) > 1:
        raise SystemExit("the counts differ: see above")


if __name__ == "__main__":
    main()
