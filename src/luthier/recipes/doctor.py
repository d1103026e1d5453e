"""Doctor: what this machine offers to luthier, and what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from pathlib import Path

import psutil
import torch

from luthier.core.errors import SandboxUnavailableError
from luthier.core.paths import cache_folder
from luthier.core.units import bytes_text, rate_text
from luthier.kernels.chosen import backend_for
from luthier.kernels.wanted import wanted_kernels
from luthier.model.load import choose_precision, resolve_source
from luthier.model.machine import rates
from luthier.sandbox.sandbox import open_sandbox

NEEDED = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pydantic", "jinja2")
OPTIONAL = {
    "pyarrow": 'parquet files: pip install "luthier[data]"',
    "sacrebleu": 'BLEU in comparisons: pip install "luthier[metrics]"',
    "llguidance": 'answers by JSON schema or regular expression: pip install "luthier[guided]"',
    "onnxruntime": 'encoders as ONNX graphs: pip install "luthier[onnx]"',
    "peft": "nothing: only luthier's own tests use it",
}
LEAST_FREE_BYTES = 2_000_000_000
INSTALL = "pip install -c constraints.txt -e ."
SHAPE = (1024, 4096)
"""The product whose speed is told: that of a feed-forward of a model of about half a billion parameters."""
ELSEWHERE = {
    "cache": "set LUTHIER_CACHE to a folder that is",
    "runs": "change to another folder, or name a run directory with --run",
}


def examine() -> list[dict[str, str]]:
    """One finding for each thing: what, its state (fine, note or missing), and what to know about it."""
    return [*_packages(), *_devices(), *_places(), _sandbox(), _seedling()]


def _packages() -> list[dict[str, str]]:
    versions = {name: _version(name) for name in NEEDED}
    absent = f"not installed; {INSTALL}"
    found = [_finding(name, "fine" if version else "missing", version or absent) for name, version in versions.items()]
    for name, purpose in OPTIONAL.items():
        version = _version(name)
        found.append(_finding(name, "fine" if version else "note", version or f"not installed; for {purpose}"))
    return found


def _devices() -> list[dict[str, str]]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    memory = psutil.virtual_memory()
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    dtype, why = choose_precision("auto", SHAPE, device)
    found = rates(device, dtype, inputs=SHAPE[0], outputs=SHAPE[1], anew=True)
    name = str(dtype).removeprefix("torch.")
    speed = f"{name} products {rate_text(found.flops)}, copies {bytes_text(found.bytes)}/s (at best)"
    gpu = torch.cuda.get_device_name(0) if device.type == "cuda" else "none; everything runs on the CPU"
    return [
        _finding("GPU", "fine" if device.type == "cuda" else "note", gpu),
        _finding("CPU", "fine", f"{cores} cores, {torch.get_num_threads()} torch threads"),
        _finding("memory", "fine", f"{bytes_text(memory.available)} of {bytes_text(memory.total)} free"),
        _finding("speed", "fine", speed),
        _finding("precision", "fine", why),
        _kernels(device, dtype),
    ]


def _kernels(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What runs the blocks of a model here; the C++ is compiled now if it is not in the cache."""
    wanted = wanted_kernels()
    backend, missing = backend_for(wanted, device, dtype)
    shown = "torch, the zoo's own modules one by one" if wanted == "torch" else backend.identity
    return _finding("kernels", "note" if missing else "fine", f"{shown} ({missing})" if missing else shown)


def _places() -> list[dict[str, str]]:
    found = []
    for what, folder in (("cache", cache_folder()), ("runs", Path("runs").absolute())):
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        writable = os.access(existing, os.W_OK)
        state = "missing" if not writable else "fine" if free > LEAST_FREE_BYTES else "note"
        detail = f"{folder}, {bytes_text(free)} free"
        found.append(_finding(what, state, detail if writable else f"{detail}, not writable; {ELSEWHERE[what]}"))
    return found


def _seedling() -> dict[str, str]:
    weights = Path(resolve_source("seedling")) / "model.safetensors"
    if weights.is_file():
        return _finding("seedling", "fine", str(weights))
    grow = "install luthier again, or grow them in a checkout: python scripts/grow_seedling.py"
    return _finding("seedling", "missing", f"its weights are not at {weights}; {grow}")


def _sandbox() -> dict[str, str]:
    """Which walls stand here, found out by building them and sending the probes of the self-test against them."""
    try:
        with open_sandbox(workers=1) as sandbox:
            over = f" (not {'; '.join(sandbox.passed_over)})" if sandbox.passed_over else ""
            return _finding("sandbox", "fine", f"{', '.join(sandbox.layers)}{over}")
    except SandboxUnavailableError as failure:
        return _finding("sandbox", "note", f"none, so nothing that a model wrote can be run: {failure}")


def _finding(what: str, state: str, detail: str) -> dict[str, str]:
    return {"what": what, "state": state, "detail": detail}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
