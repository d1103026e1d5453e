"""What saving the state of a run takes: until its checkpoint is durable, read back and linked.

    python benchmarks/checkpoint.py --megabytes 1000 --repetitions 5

A state of that size (a master and the two moments of AdamW for each of a hundred tensors) is saved in a folder beside
the others, as a run saves it, and removed. Wall and CPU seconds of each repetition, and by how much the process's peak
of resident memory has grown over what the state takes.
To compare two versions of luthier, run them in turn with PYTHONPATH set to the one and to the other.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from counts import count

from luthier.store.checkpoints import CheckpointStore
from luthier.train.state import Snapshot

TENSORS = 100


def state(megabytes: int) -> Snapshot:
    """A state of random numbers."""
    numbers = megabytes * 10**6 // 4 // (3 * TENSORS)
    generator = torch.Generator().manual_seed(0)
    kinds = ("master/{}", "optimizer/{}/exp_avg", "optimizer/{}/exp_avg_sq")
    names = [kind.format(f"layers.{layer}.weight") for layer in range(TENSORS) for kind in kinds]
    return Snapshot(1, {name: torch.randn(numbers, generator=generator) for name in names}, {"loop": {"step": 1}})


def peak() -> float:
    """The peak of this process's resident memory so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=count, default=1000)
    parser.add_argument("--repetitions", type=count, default=3)
    parser.add_argument("--folder", type=Path, default=Path(), help="on which disk: a folder there")
    args = parser.parse_args()
    snapshot = state(args.megabytes)
    before = peak()
    for _ in range(args.repetitions):
        with tempfile.TemporaryDirectory(dir=args.folder) as place:
            wall, cpu = time.perf_counter(), time.process_time()
            CheckpointStore(Path(place) / "checkpoints").save(1, snapshot.write, {}, needed_bytes=snapshot.bytes)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            print(f"{wall:.2f} s wall, {cpu:.2f} s CPU, peak + {peak() - before:.0f} MB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
