"""What four bits cost in quality: LoRA on NF4 with paged AdamW beside LoRA on bfloat16, the same seeds, rows and steps.

    python benchmarks/qlora_quality.py --model seedling --steps 100 --seeds 3

Trains the demo's task (a sentence about an order becomes JSON) from the same starts and prints one JSON object: the
held-out loss of each run, the difference of the means, its noise, and the bits of a packed weight by the bytes of its
tensors.
Exit code 1 when the means differ by more than the noise: twice the standard error of the difference of two means.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from counts import count

import luthier
from luthier.assets.demo_task import demo_rows
from luthier.model.packed import packing_of, stored_bytes

ROWS, HELD_OUT, BATCH = 800, 64, 8
WAYS = {"lora-bfloat16": ("none", "adamw"), "qlora": ("nf4", "paged_adamw")}
BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Of NF4 with double quantization, without the one mean of each matrix."""


def trained(model: str, quantizer: str, optimizer: str, *, seed: int, steps: int) -> dict[str, Any]:
    """Held-out loss before and after `steps` steps."""
    began = time.perf_counter()
    session = luthier.load(
        model, quantizer=quantizer, optimizer=optimizer, adapter=luthier.LoRA(rank=16, targets="all-linear"),
        precision="bfloat16", seed=seed,
    )  # fmt: skip
    rows, held_out = demo_rows(ROWS, seed=0, held_out=False), demo_rows(HELD_OUT, seed=0, held_out=True)
    draw, before = random.Random(seed), session.loss(held_out)
    for _ in range(steps):
        session.forward_backward(draw.sample(rows, BATCH))
        session.optim_step()
    packed = [each for each in session.model.module.parameters() if packing_of(each) is not None]
    bits = 8 * sum(map(stored_bytes, packed)) / sum(each.numel() for each in packed) if packed else 16.0
    return {
        "seed": seed,
        "before": before,
        "after": session.loss(held_out),
        "bits": bits,
        "seconds": round(time.perf_counter() - began, 1),
    }


def verdict(plain: Sequence[float], packed: Sequence[float]) -> dict[str, Any]:
    """The means of the losses, and whether their difference is within the noise of the seeds."""
    difference = statistics.mean(packed) - statistics.mean(plain)
    error = math.sqrt(statistics.variance(plain) / len(plain) + statistics.variance(packed) / len(packed))
    return {"difference": difference, "noise": 2 * error, "within_noise": abs(difference) <= 2 * error}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="seedling", help="base model")
    parser.add_argument("--steps", type=count, default=100, help="optimizer steps")
    parser.add_argument("--seeds", type=count, default=3, help="runs of each way, at least two")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error("one seed has no spread")
    runs = {
        name: [trained(args.model, *way, seed=seed, steps=args.steps) for seed in range(args.seeds)]
        for name, way in WAYS.items()
    }
    plain, packed = ([run["after"] for run in each] for each in runs.values())
    found = {"model": args.model, "steps": args.steps, "runs": runs, **verdict(plain, packed), "bits_of_the_card": BITS}
    print(json.dumps(found, indent=1))
    return 0 if found["within_noise"] else 1


if __name__ == "__main__":
    sys.exit(main())
