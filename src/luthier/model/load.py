"""Loading a base model: from a folder, a hub id, `seedling`, or freshly initialised from a config.

Safetensors only. A folder that holds its weights as a pickle is refused, and so is a config that asks for code or
steers which code is used: model files are data. No remote code is ever run.
Precision: weights are computed in the precision chosen here; trained parameters keep float32 copies elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as zoo_logging

from luthier.core.errors import CorruptError, LuthierError, MissingError, RecipeError, UnsafeArtifactError
from luthier.core.nearest import nearest
from luthier.data.hub import only_cached
from luthier.model import attention
from luthier.model.language_model import LanguageModel

Precision = Literal["auto", "float32", "bfloat16"]

FRESH = "fresh:"
"""A source with this prefix is a folder whose config is used and whose weights are drawn anew."""

SEEDLING = "seedling"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
BFLOAT16_HIDDEN = 512
"""Below this hidden size bfloat16 gains no speed over float32 on a CPU and only rounds more (`--set precision=...`)."""


def resolve_source(source: str) -> str:
    """The folder or hub id behind a model name: `seedling` is the folder that ships with luthier."""
    name = source.removeprefix(FRESH)
    if name == SEEDLING:
        return str(Path(__file__).resolve().parents[1] / "assets" / "seedling")
    place = Path(name).expanduser()
    if place.is_file():
        raise MissingError(f"{name} is a file", allowed="a model folder, a hub id, or seedling")
    if place.exists():
        return str(place)
    # A hub id has one slash at most; anything else can only have meant a folder.
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        beside = [path.name for path in place.parent.iterdir() if path.is_dir()] if place.parent.is_dir() else []
        close = nearest(place.name, beside)
        do = f"did you mean {' or '.join(close)}?" if close else "check the path; a hub id has the form owner/name"
        raise MissingError(f"there is no model folder {name}", do=do)
    return name


def load_model(
    source: str, *, precision: Precision = "auto", device: str = "auto", seed: int = 0
) -> LanguageModel:
    """The base model `source`, frozen, in evaluation mode, on its device.

    Raises UnsafeArtifactError for pickles and config-steered code, MissingError when there is no such model, and
    RecipeError when it is no causal language model.
    """
    attention.register()
    name = resolve_source(source)
    fresh = source.startswith(FRESH)
    if Path(name).is_dir():
        _check_folder(Path(name), needs_weights=not fresh)
    config = _load_config(name, source)
    dtype, reason = choose_precision(precision, int(config.get_text_config().hidden_size), _device(device))
    module = _fresh(config, dtype, seed) if fresh else _load_weights(name, source, dtype)
    module.to(_device(device))
    digest = state_digest(module) if fresh or not Path(name).is_dir() else folder_digest(Path(name))
    return LanguageModel(module, source=source, digest=digest, notices=(f"precision: {reason}",))


def context_tokens(source: str) -> int | None:
    """The longest sequence that the config of a model allows for, without loading its weights."""
    name = resolve_source(source)
    if Path(name).is_dir():
        _check_folder(Path(name), needs_weights=False)
    limit = getattr(_load_config(name, source).get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else None


def choose_precision(precision: Precision, hidden: int, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of weights and products, and why."""
    if precision != "auto":
        return getattr(torch, precision), f"{precision}, as asked"
    if device.type == "cuda":
        return torch.bfloat16, "bfloat16, the GPU's matrix units compute in it"
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if fast and hidden >= BFLOAT16_HIDDEN:
        return torch.bfloat16, "bfloat16, this CPU multiplies it natively"
    if fast:
        return torch.float32, f"float32, hidden size {hidden} is too small for bfloat16 to pay on a CPU"
    return torch.float32, "float32, this CPU has no bfloat16 products"


def folder_digest(folder: Path) -> str:
    """sha256 over all weight files of a model folder, by name: identifies a base model on disk."""
    total = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        total.update(path.name.encode())
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


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


def _check_folder(folder: Path, *, needs_weights: bool) -> None:
    if not (folder / "config.json").is_file():
        raise RecipeError(
            f"{folder} has no config.json", do="name a folder in the Hugging Face layout, a hub id, or seedling"
        )
    _check_config(folder / "config.json")
    if not needs_weights or list(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise UnsafeArtifactError(
            f"{folder} holds its weights as {', '.join(pickles[:3])}, a pickle that could run code when loaded",
            allowed="safetensors",
            do="take the safetensors version of this model, or convert it where running its code does no harm",
        )
    raise RecipeError(
        f"{folder} has a config but no weights", do=f"write {FRESH}{folder} to draw new ones, or add model.safetensors"
    )


def _check_config(path: Path) -> None:
    try:
        values = json.loads(path.read_text("utf-8"))
    except ValueError as failure:
        raise CorruptError(f"{path} is not valid JSON: {failure}") from None
    steering = [key for key in values if key in ("auto_map", "trust_remote_code") or "attn_implementation" in key]
    if steering:
        raise UnsafeArtifactError(
            f"{path} steers which code is run ({', '.join(steering)})",
            allowed="a config that is data only",
            do="remove these keys if transformers itself has the model type; luthier runs no remote code",
        )


def _load_config(name: str, source: str):  # type: ignore[no-untyped-def]  # transformers returns one class a model type
    alone = Path(name).is_dir() or only_cached(name)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False, local_files_only=alone)
    except (OSError, ValueError, KeyError) as failure:
        raise _explain(source, failure) from None


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


def _load_weights(name: str, source: str, dtype: torch.dtype) -> PreTrainedModel:
    alone = Path(name).is_dir() or only_cached(name)
    settings = {"dtype": dtype, "trust_remote_code": False, "use_safetensors": True, "local_files_only": alone}
    # transformers reports missing and unexpected tensors in a table on its logger; we raise instead.
    # It also warns of layers that no tensor-parallel plan covers, where there is one device.
    for noisy in ("transformers.modeling_utils", "transformers.distributed.tensor_parallel"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        with without_bars(local=Path(name).is_dir()):
            module, info = _with_our_attention(name, settings)
    except (OSError, ValueError, KeyError) as failure:
        raise _explain(source, failure) from None
    missing = sorted(set(info.get("missing_keys", ())))
    mismatched = sorted(str(key) for key in info.get("mismatched_keys", ()))
    if missing or mismatched:
        raise CorruptError(
            f"{source}: {len(missing)} tensors are missing and {len(mismatched)} have another shape "
            f"({', '.join([*missing, *mismatched][:4])})",
            do="the weight files do not belong to this config.json",
        )
    return module


def _with_our_attention(name: str, settings: dict[str, object]) -> tuple[PreTrainedModel, dict[str, Any]]:
    try:
        return AutoModelForCausalLM.from_pretrained(
            name, attn_implementation=attention.NAME, output_loading_info=True, **settings
        )
    except ValueError as failure:
        if "attention" not in str(failure).lower():
            raise
        return AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **settings)


def _fresh(config, dtype: torch.dtype, seed: int) -> PreTrainedModel:  # type: ignore[no-untyped-def]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention.NAME)
        except ValueError as failure:
            if "attention" not in str(failure).lower():
                raise
            return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _explain(source: str, failure: Exception) -> LuthierError:
    text = " ".join(str(failure).split())[:300]
    if "trust_remote_code" in text or "custom code" in text:
        return UnsafeArtifactError(f"{source} needs code of its own: {text}", do="choose a model transformers knows")
    if "safetensors" in text and "pytorch_model" in text:
        return UnsafeArtifactError(f"{source} has no safetensors weights: {text}", allowed="safetensors")
    if isinstance(failure, OSError):
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        return MissingError(
            f"no model {source!r} was found on disk or on the hub{offline}: {text}",
            do="check the name; a folder must exist, a hub id has the form owner/name",
        )
    return RecipeError(f"{source} cannot be loaded: {text}")
