"""Result lines and jobs for the tests of the benchmarks, and their modules."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
REFERENCE = {"loss": 10.5, "grad_norm": 2.0}


def module(name: str) -> ModuleType:
    """A script of the benchmarks; they import their neighbours by plain name."""
    return importlib.import_module(name)


def line_of(system: str = "luthier", *, rate: float = 100.0, memory: int = 10**9, **changes: Any) -> dict[str, Any]:
    line = {
        "run": "r1", "tier": "quick", "system": system, "repetition": 0, "commit": "abc", "data_digest": "d" * 64,
        "workload": "m1-lora", "precision": "bfloat16", "device": "cpu", "seed": 0, "threads": 2,
        "valid": True, "contended": False, "tokens_per_second": rate, "peak_memory_bytes": memory,
        "tokens": {"real": 1000, "supervised": 400, "padded": 2000, "pairs": 100_000, "padding_share": 0.5},
        "percent_of_limit": 61.2, "checks": {"first_loss": True}, "reference": REFERENCE,
        "steps": {"all": 4, "warm": 1, "rows": 16, "max_tokens": 512}, "settings": {"threads": 2},
        "versions": {"torch": "2", "python": "3"}, "loss": {"first": 10.5, "last": 10.4}, "grad_norm_first": 2.0,
        "machine": {"cpu": "c", "cores": 2, "memory_bytes": 2**34, "python": "3"},
        "parameters": {"tensors": 4, "changed": 4},
        "probes": {
            "before": {"gemm_gflops": 400.0, "block_gflops": 380.0},
            "after": {"gemm_gflops": 390.0, "block_gflops": 395.0},
        },
    }  # fmt: skip
    return line | changes


def job(**changes: Any) -> Any:
    values = {"home": Path(), "system": "s", "workload": "m2-lora", "steps": 4, "warm": 1, "seed": 0, "settings": {}}
    return module("worker").Job(**(values | {"grouped": False} | changes))
