"""Time and peak memory of a training pass, with weights as they are or in four bits, each in a process of its own.

    python benchmarks/qlora_pass.py bench-home/m2/model none
    python benchmarks/qlora_pass.py bench-home/m2/model nf4

Four rows of 256 random tokens that all carry loss, LoRA with its defaults, three steps. Linux: the peak is the
kernel's own count of resident memory, set back before the first step.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from luthier.data.forest import row_tree
from luthier.recipes.opening.session import load
from luthier.recipes.sizing.memory import use_pool

STEPS = 3
ROWS, TOKENS = 4, 256


def main(model: str, quantizer: str) -> None:
    """Print a line for each step."""
    session = load(model, quantizer=quantizer, precision="bfloat16")
    use_pool(session.model)
    draw = np.random.default_rng(0)
    ones = np.ones(TOKENS, np.float32)
    trees = [row_tree(draw.integers(5, 1000, TOKENS).astype(np.int32), ones, row=row) for row in range(ROWS)]
    print(f"{quantizer}: {_resident('VmRSS'):.2f} GB before the first step")
    Path("/proc/self/clear_refs").write_text("5")
    for step in range(STEPS):
        began = time.perf_counter()
        session.stepper.forward_backward(trees)
        seconds = time.perf_counter() - began
        session.optim_step()
        print(f"step {step}: pass {seconds:.2f} s, peak so far {_resident('VmHWM'):.2f} GB")


def _resident(name: str) -> float:
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) / 1e6


if __name__ == "__main__":
    main(*sys.argv[1:3])
