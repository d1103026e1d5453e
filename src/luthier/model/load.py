"""Loading a base model: from a folder, a hub id, `seedling`, or freshly initialised from a config.

Safetensors only. A folder that holds its weights as a pickle is refused, and so is a config that asks for code or
steers which code is used: model files are data. The config passes a gate (`config_gate.py`), tensors are read and
checked here (`weights.py`), and transformers itself opens no file of a model. No remote code is ever run.
Precision: weights are computed in the precision chosen here; trained parameters keep float32 copies elsewhere.
Kernels: our fused operations run models that have the shape for them, unless LUTHIER_KERNELS says otherwise
(kernels/chosen.py). Results are the same up to rounding.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Literal

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as zoo_logging

from luthier.core.errors import MissingError, RecipeError
from luthier.core.units import rate_text
from luthier.data.hub import ModelFiles
from luthier.data.rendering.renderer import Kind
from luthier.kernels.chosen import backend_for
from luthier.kernels.halves import multiplies_halves
from luthier.kernels.wanted import wanted_kernels
from luthier.model.attending import attention
from luthier.model.files.configs import checked_config, config_of
from luthier.model.files.packed_files import Found, PackedReader, make_room, put_packed, take_packed
from luthier.model.files.sources import FRESH, resolve_source
from luthier.model.files.weight_files import folder_digest, weight_files
from luthier.model.files.weights import (
    fresh_module,
    module_with,
    read_weights,
    take_generation_settings,
    without_weights,
)
from luthier.model.language_model import LanguageModel
from luthier.model.machine import rates
from luthier.model.spoken import REASON, speaks_in_halves
from luthier.model.tasks import CAUSAL, Task, kind_of

Precision = Literal["auto", "float32", "bfloat16"]
ReaderOf = Callable[[Mapping[str, object]], PackedReader]
"""What reads files with this `quantization_config`."""

WORTH_ROUNDING = 1.2
"""How much faster bfloat16 products must be on a CPU before `auto` takes them."""


def load_model(
    source: str,
    *,
    precision: Precision = "auto",
    device: str = "auto",
    seed: int = 0,
    task: Task = CAUSAL,
    packed: ReaderOf | None = None,
    speaks: bool = False,
) -> LanguageModel:
    """The base model `source` for `task`, frozen, in evaluation mode, on its device.

    `packed` finds what reads files whose weights are packed; without it they are refused. With `speaks` it is to make
    text, and where it would be in float32 it is in bfloat16 if that is faster (see `spoken.py`).
    Raises UnsafeArtifactError for pickles and config-steered code, MissingError when there is no such model,
    CorruptError for damaged files, and RecipeError when it is no model for the task.
    """
    attention.register()
    name = resolve_source(source)
    fresh = source.startswith(FRESH)
    files = ModelFiles.of(name)
    checked = checked_config(files, quantized=packed is not None and not fresh)
    reader = packed(checked.quantization) if packed is not None and checked.quantization else None
    dtype, reason = choose_precision(precision, _shape(checked.config.get_text_config()), _device(device))
    may_round = speaks and dtype == torch.float32 and _device(device).type == "cpu" and task == CAUSAL and not fresh
    if may_round and speaks_in_halves(checked.config, weight_files(files), source=source):
        dtype, reason = torch.bfloat16, REASON
    found: dict[str, Found] = {}
    # Read beside the work, which reads the same bytes: neither waits for the other.
    with _beside(None if fresh else files.folder) as folders_digest:
        if fresh:
            loaded = fresh_module(checked.config, dtype, seed, source, task=task)
        else:
            with without_bars(local=files.folder is not None):
                tensors = read_weights(weight_files(files), widen=dtype == torch.float32)
                if reader is not None:
                    backend, _ = backend_for(wanted_kernels(), _device(device), dtype)
                    empty = without_weights(checked.config, source, task=task)
                    found = take_packed(tensors, reader, backend, empty, dtype)
                loaded = module_with(checked.config, tensors, dtype, source, task=task, seed=seed)
            take_generation_settings(loaded.module, files)
        module = loaded.module
        module.config.name_or_path = name
        make_room(module, found)
        module.to(_device(device))
        put_packed(module, found, _device(device), dtype)
        digest = folders_digest() or state_digest(module)
    held = (f"quantizer: the files hold {len(found)} matrices that are packed",) if found else ()
    notices = (f"precision: {reason}", *checked.notices, *loaded.notices, *held)
    return LanguageModel(
        module, source=source, digest=digest, notices=notices, kernels=wanted_kernels(), task=task, fresh=loaded.fresh,
        # Of what was just drawn, or packed on the way, nobody asks twice.
        known_as="" if fresh or found else digest,
    )  # fmt: skip


def kind_of_source(source: str) -> Kind:
    """How a model reads, by its config alone."""
    return kind_of(config_of(source))


def choose_precision(precision: Precision, shape: tuple[int, int], device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of weights and products, and why; `shape` is inputs and outputs of a block's widest product."""
    if precision != "auto":
        return getattr(torch, precision), f"{precision}, as asked"
    if device.type == "cuda":
        return torch.bfloat16, "bfloat16, the GPU's matrix units compute in it"
    if not multiplies_halves():
        # Not measured: without such instructions a single product may take minutes.
        return torch.float32, "float32, this CPU has no bfloat16 products"
    inputs, outputs = shape
    half, full = (
        rates(device, dtype, inputs=inputs, outputs=outputs).flops for dtype in (torch.bfloat16, torch.float32)
    )
    compared = f"products of {inputs} x {outputs} run at {rate_text(half)} in bfloat16, {rate_text(full)} in float32"
    if half >= WORTH_ROUNDING * full:
        return torch.bfloat16, f"bfloat16, {compared}"
    return torch.float32, f"float32, {compared}"


def _shape(config: PreTrainedConfig) -> tuple[int, int]:
    """Inputs and outputs of a block's widest product."""
    hidden = int(config.hidden_size)
    inner = getattr(config, "intermediate_size", None)
    return hidden, int(inner) if isinstance(inner, int) and inner > 0 else 4 * hidden


@contextmanager
def _beside(folder: Path | None) -> Iterator[Callable[[], str]]:
    """The digest of a folder, from a thread that ends with the `with`; empty without a folder."""
    over = Event()
    with ThreadPoolExecutor(1, "digest") as thread:
        known = None if folder is None else thread.submit(folder_digest, folder, wanted=lambda: not over.is_set())
        try:
            yield lambda: "" if known is None else known.result()
        finally:
            over.set()


def state_digest(module: PreTrainedModel) -> str:
    """sha256 over all parameters of a model in memory."""
    total = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = device.partition(":")
    cards = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise RecipeError(f"device is {device!r}", allowed=" | ".join(["auto", "cpu", *cards]))
    if kind == "cuda" and f"cuda:{number or 0}" not in cards:
        raise MissingError(f"device is {device!r}, which is not here", allowed=" | ".join(["auto", "cpu", *cards]))
    return torch.device(device)


@contextmanager
def without_bars(*, local: bool) -> Iterator[None]:
    """Keep transformers from drawing bars for files it reads in an instant; a download keeps its own."""
    shown = zoo_logging.is_progress_bar_enabled()
    if local or not sys.stderr.isatty():
        zoo_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            zoo_logging.enable_progress_bar()
