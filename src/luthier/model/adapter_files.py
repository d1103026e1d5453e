"""Adapter files in PEFT's format, both ways.

`adapter_config.json` and `adapter_model.safetensors` are what PEFT reads and writes; `luthier.json` beside them holds
what PEFT has no place for: the digest of the base weights the adapter was trained on, and the run it came from.
Loading is strict: every tensor is used, every expected one is there, shapes agree, and the base is the same one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from luthier.core.errors import CorruptError, DriftError, RecipeError, UnsafeArtifactError
from luthier.model.attachment import Attachment
from luthier.model.language_model import LanguageModel

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
EXTRAS = "luthier.json"


def save_adapter(
    folder: Path,
    attachment: Attachment,
    *,
    peft_type: str,
    config: Mapping[str, Any],
    base: str,
    extras: Mapping[str, Any],
) -> None:
    """Write the adapter into `folder`: float32 tensors, keys sorted, so that equal adapters are equal files."""
    folder.mkdir(parents=True, exist_ok=True)
    named = attachment.named_tensors()
    tensors = {name: named[name].detach().float().cpu().contiguous() for name in sorted(named)}
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    whole = {
        "peft_type": peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        **config,
    }
    _write_json(folder / CONFIG, whole)
    save_extras(folder, extras)


def save_extras(folder: Path, extras: Mapping[str, Any]) -> None:
    """Write what luthier knows of a result beside it."""
    _write_json(folder / EXTRAS, dict(extras))


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter's configuration. Raises RecipeError when the folder holds no adapter."""
    path = folder / CONFIG
    if not path.is_file():
        raise RecipeError(f"{folder} holds no {CONFIG}", do="name a folder in PEFT's format, or a run directory")
    if not (folder / TENSORS).is_file():
        if list(folder.glob("*.bin")):
            raise UnsafeArtifactError(f"{folder} holds its tensors as a pickle", allowed=TENSORS)
        raise CorruptError(f"{folder} holds no {TENSORS}")
    return _read_json(path)


def read_extras(folder: Path) -> dict[str, Any]:
    """What luthier wrote beside the adapter; empty for adapters from elsewhere."""
    path = folder / EXTRAS
    return _read_json(path) if path.is_file() else {}


@torch.no_grad()
def fill(attachment: Attachment, folder: Path) -> None:
    """Load the tensors of `folder` into an attachment of the same shape, strictly."""
    try:
        found = load_file(folder / TENSORS)
    except SafetensorError as failure:
        raise CorruptError(f"{folder / TENSORS} cannot be read: {failure}") from None
    expected = attachment.named_tensors()
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unknown:
        raise CorruptError(
            f"{folder / TENSORS}: {len(missing)} expected tensors are missing ({', '.join(missing[:2])}) and "
            f"{len(unknown)} have no place in this model ({', '.join(unknown[:2])})",
            do="the adapter was made for another model, or with other targets than its config says",
        )
    for name, tensor in found.items():
        if expected[name].shape != tensor.shape:
            raise CorruptError(f"{name} has shape {tuple(tensor.shape)}", allowed=str(tuple(expected[name].shape)))
    for name, tensor in found.items():
        expected[name].copy_(tensor)


def check_base(folder: Path, model: LanguageModel) -> None:
    """Refuse an adapter that was trained on other base weights, when it says on which."""
    recorded = read_extras(folder).get("base_digest")
    if recorded and recorded != model.digest:
        raise DriftError(
            f"{folder} was trained on base weights {str(recorded)[:12]}..., {model.source} has {model.digest[:12]}...",
            do="load the base model it was trained on",
        )


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text("utf-8"))
    except ValueError as failure:
        raise CorruptError(f"{path} is not valid JSON: {failure}") from None
    if not isinstance(values, dict):
        raise CorruptError(f"{path} holds a {type(values).__name__}", allowed="an object")
    return values
