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
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Literal, cast

import torch
from torch import Tensor

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
from luthier.model.files.tensor_files import read_weights
from luthier.model.files.weight_files import folder_digest, weight_files
from luthier.model.known_decoders import Known, known_decoder, proved, remember_decoder
from luthier.model.language_model import LanguageModel
from luthier.model.machine import rates
from luthier.model.own.decoder import Decoder
from luthier.model.spoken import REASON, speaks_in_halves
from luthier.model.tasks import CAUSAL, Task, kind_of
from luthier.model.zoo import ZooConfig, ZooModule

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
    own_modules: bool = False,
) -> LanguageModel:
    """The base model `source` for `task`, frozen, in evaluation mode, on its device.

    `packed` finds what reads files whose weights are packed; without it they are refused. With `speaks` it is to make
    text, and where it would be in float32 it is in bfloat16 if that is faster (see `spoken.py`). With `own_modules` it
    may be made of ours, which the zoo has shown to compute the same (see `own/`): then the zoo is not even imported.
    Raises UnsafeArtifactError for pickles and config-steered code, MissingError when there is no such model,
    CorruptError for damaged files, and RecipeError when it is no model for the task.
    """
    asked = _Asked(
        source, ModelFiles.of(resolve_source(source)), precision, _device(device), seed, task, packed,
        speaks=speaks and task == CAUSAL and not source.startswith(FRESH),
    )  # fmt: skip
    may_be_ours = own_modules and task == CAUSAL and asked.device.type == "cpu" and wanted_kernels() != "torch"
    may_be_ours = may_be_ours and not asked.fresh
    known = known_decoder(asked.files) if may_be_ours else None
    if known is None:
        return _of_the_zoo(asked, remembered=may_be_ours)
    read = _read(asked, known)
    return _of_ours(asked, known, read) or _of_the_zoo(asked, remembered=True, read=read)


@dataclass(frozen=True)
class _Asked:
    """Which model is wanted, and how; `speaks` where it is to make text in the precision that is fastest."""

    source: str
    files: ModelFiles
    precision: Precision
    device: torch.device
    seed: int
    task: Task
    packed: ReaderOf | None
    speaks: bool

    @property
    def fresh(self) -> bool:
        """Whether the weights are drawn anew."""
        return self.source.startswith(FRESH)

    def dtype(self, config: ZooConfig, has_blocks: Callable[[], bool]) -> tuple[torch.dtype, str]:
        """The dtype of weights and products, and why, also of a model that is to make text."""
        dtype, reason = choose_precision(self.precision, _shape(config.get_text_config()), self.device)
        may_round = self.speaks and dtype == torch.float32 and self.device.type == "cpu"
        if may_round and speaks_in_halves(weight_files(self.files)) and has_blocks():
            return torch.bfloat16, REASON
        return dtype, reason


@dataclass(frozen=True)
class _Read:
    """The weights of a decoder that is known, their digest, and the precision they were read for, with its reason."""

    tensors: dict[str, Tensor]
    digest: str
    dtype: torch.dtype
    reason: str


def _read(asked: _Asked, known: Known) -> _Read:
    dtype, reason = asked.dtype(cast("ZooConfig", known.config), lambda: True)
    with _beside(asked.files.folder) as folders_digest:
        tensors = read_weights(weight_files(asked.files), widen=dtype == torch.float32)
        return _Read(tensors, folders_digest(), dtype, reason)


def _of_ours(asked: _Asked, known: Known, read: _Read) -> LanguageModel | None:
    """The model in our own modules; None where that was not proved for these weights in this precision."""
    backend, _ = backend_for(wanted_kernels(), asked.device, read.dtype)
    shape = proved(known, read.digest, read.dtype, backend)
    if shape is None or not shape.fits(read.tensors):
        return None
    parameters = shape.frozen(read.tensors, read.dtype)
    module = Decoder(shape, parameters, known.config, generation=known.generation, files=asked.files)
    return LanguageModel(
        cast("ZooModule", module), source=asked.source, digest=read.digest, kernels=wanted_kernels(),
        known_as=read.digest, notices=(f"precision: {read.reason}", *known.notices),
    )  # fmt: skip


def _of_the_zoo(asked: _Asked, *, remembered: bool, read: _Read | None = None) -> LanguageModel:
    """The model in the zoo's modules, `remembered` for the next time where ours do. What was `read` is used."""
    from luthier.model.files.weights import fresh_module, module_with, take_generation_settings, without_weights
    from luthier.model.spoken import has_our_blocks

    attention.register()
    source, files, task, fresh = asked.source, asked.files, asked.task, asked.fresh
    checked = checked_config(files, quantized=asked.packed is not None and not fresh)
    reader = asked.packed(checked.quantization) if asked.packed is not None and checked.quantization else None
    dtype, reason = asked.dtype(checked.config, lambda: has_our_blocks(checked.config, source))
    found: dict[str, Found] = {}
    # Read beside the work, which reads the same bytes: neither waits for the other.
    with _beside(None if fresh or read is not None else files.folder) as folders_digest:
        if fresh:
            loaded = fresh_module(checked.config, dtype, asked.seed, source, task=task)
        else:
            with without_bars(local=files.folder is not None):
                tensors = (read_weights(weight_files(files), widen=dtype == torch.float32)
                           if read is None or read.dtype != dtype else read.tensors)  # fmt: skip
                if reader is not None:
                    backend, _ = backend_for(wanted_kernels(), asked.device, dtype)
                    empty = without_weights(checked.config, source, task=task)
                    found = take_packed(tensors, reader, backend, empty, dtype)
                loaded = module_with(checked.config, tensors, dtype, source, task=task, seed=asked.seed)
            take_generation_settings(loaded.module, files)
        module = loaded.module
        module.config.name_or_path = files.source
        make_room(module, found)
        module.to(asked.device)
        put_packed(module, found, asked.device, dtype)
        digest = (folders_digest() if read is None else read.digest) or state_digest(module)
    held = (f"quantizer: the files hold {len(found)} matrices that are packed",) if found else ()
    model = LanguageModel(
        module, source=source, digest=digest, kernels=wanted_kernels(), task=task, fresh=loaded.fresh,
        notices=(f"precision: {reason}", *checked.notices, *loaded.notices, *held),
        # Of what was just drawn, or packed on the way, nobody asks twice.
        known_as="" if fresh or found else digest,
    )  # fmt: skip
    if remembered and not (found or loaded.notices or loaded.fresh):
        remember_decoder(files, model, checked.notices)
    return model


def kind_of_source(source: str) -> Kind:
    """How a model reads, by its config alone."""
    return "causal" if is_known_decoder(source) else kind_of(config_of(source))


def is_known_decoder(source: str) -> bool:
    """Whether the zoo has shown this model to be a decoder that our own modules do for."""
    return known_decoder(ModelFiles.of(resolve_source(source))) is not None


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


def _shape(config: ZooConfig) -> tuple[int, int]:
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


def state_digest(module: ZooModule) -> str:
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
    from transformers.utils import logging as zoo_logging

    shown = zoo_logging.is_progress_bar_enabled()
    if local or not sys.stderr.isatty():
        zoo_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            zoo_logging.enable_progress_bar()
