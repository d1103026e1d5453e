"""Adapter files in PEFT's format, both ways.

`adapter_config.json` and `adapter_model.safetensors` are what PEFT reads and writes; `luthier.json` beside them holds
what PEFT has no place for: the digest of the base weights the adapter was trained on, and the run it came from.
Loading is strict: every tensor is used, every expected one is there, shapes agree, and the base is the same one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from luthier.core.errors import CorruptError, DriftError, RecipeError, UnsafeArtifactError
from luthier.model.editing.attachment import PEFT_PREFIX, Attachment
from luthier.model.files.json_files import read_object, write_object
from luthier.model.files.tensor_files import load_tensors, tensor_shapes
from luthier.model.language_model import LanguageModel
from luthier.model.tasks import CAUSAL, PEFT_TYPES, Task

PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
"""What PEFT's `init_lora_weights` is where it has left the base as it was."""
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
    task: Task = CAUSAL,
    extras: Mapping[str, Any],
) -> None:
    """Write the adapter into `folder`: float32 tensors, keys sorted, so that equal adapters are equal files."""
    folder.mkdir(parents=True, exist_ok=True)
    named = attachment.named_tensors()
    # Cloned: the rows of a tied head are one tensor under two names, which the format refuses to share.
    tensors = {name: named[name].detach().float().cpu().contiguous().clone() for name in sorted(named)}
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    whole = {
        "peft_type": peft_type,
        "task_type": PEFT_TYPES[task.name],
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        **config,
    }
    whole |= beside(attachment)
    write_object(folder / CONFIG, whole)
    save_extras(folder, extras)


def beside(attachment: Attachment) -> dict[str, Any]:
    """What `adapter_config.json` says of a new head that is trained beside the adapter; nothing where there is none."""
    parts = [part.rpartition(".")[2] for part in attachment.new_parts]
    return {"modules_to_save": parts} if parts else {}


def save_extras(folder: Path, extras: Mapping[str, Any]) -> None:
    """Write what luthier knows of a result beside it."""
    write_object(folder / EXTRAS, dict(extras))


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter's configuration. Raises RecipeError when the folder holds no adapter.

    A pattern of target modules is not run but replaced by the modules that the tensor file names: matching it against
    the model could take for ever.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise RecipeError(f"{folder} holds no {CONFIG}", do="name a folder in PEFT's format, or a run directory")
    if not (folder / TENSORS).is_file():
        if list(folder.glob("*.bin")):
            raise UnsafeArtifactError(f"{folder} holds its tensors as a pickle", allowed=TENSORS)
        raise CorruptError(f"{folder} holds no {TENSORS}")
    config = read_object(path)
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets != "all-linear" and not re.fullmatch(r"[\w.]+", targets):
        config["target_modules"] = sorted({_module_of(name) for name in tensor_sizes(folder)} - {""})
    return config


def tensor_sizes(folder: Path) -> dict[str, int]:
    """The number of elements of each tensor in the adapter file, without reading the tensors."""
    return {name: math.prod(shape) for name, shape in tensor_shapes(folder / TENSORS).items()}


def trained_beside(folder: Path) -> tuple[str, ...]:
    """A sentence on the weights that an adapter of ours was trained beside, where these were packed."""
    kept = read_extras(folder).get("quantizer")
    name = kept.get("method", "none") if isinstance(kept, Mapping) else "none"
    if name == "none":
        return ()
    return (f"the adapter was trained beside weights in {name}, and compared beside them: beside a base in another "
            "format it says something else",)  # fmt: skip


def read_extras(folder: Path) -> dict[str, Any]:
    """What luthier wrote beside the adapter; empty for adapters from elsewhere."""
    path = folder / EXTRAS
    return read_object(path) if path.is_file() else {}


@torch.no_grad()
def fill(attachment: Attachment, folder: Path) -> None:
    """Load the tensors of `folder` into an attachment of the same shape, strictly."""
    found = load_tensors(folder / TENSORS)
    expected = attachment.named_tensors()
    for name, tensor in attachment.named_base_tensors().items():
        # PEFT writes a whole embedding or head beside factors for it.
        repeated = found.pop(name, None)
        if repeated is not None and not torch.equal(repeated.to(tensor.device, tensor.dtype), tensor):
            raise CorruptError(
                f"{folder / TENSORS}: {name} differs from the base model's",
                do="load the base it was trained on; a table of another size or with other rows is another base",
            )
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
    _require_equal_twins(folder, expected, found)
    for name, tensor in found.items():
        expected[name].copy_(tensor)


def require_plain_start(config: Mapping[str, Any]) -> None:
    """Raise RecipeError when low-rank factors are for a base that PEFT has changed: ours is as it was."""
    start = config.get("init_lora_weights")
    if start not in PLAIN_STARTS:
        raise RecipeError(
            f"the adapter file has init_lora_weights = {start!r:.80}: it is for a base whose weights were changed",
            allowed=", ".join(map(str, PLAIN_STARTS[1:])),
            do="save it with PEFT's path_initial_model_for_weight_conversion, which makes it fit the base as it is",
        )


def check_base(folder: Path, model: LanguageModel) -> None:
    """Refuse an adapter that was trained on other base weights, when it says on which."""
    recorded = read_extras(folder).get("base_digest")
    if recorded and recorded != model.digest:
        raise DriftError(
            f"{folder} was trained on base weights {str(recorded)[:12]}..., {model.source} has {model.digest[:12]}...",
            do="load the base model it was trained on",
        )


def _require_equal_twins(folder: Path, expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> None:
    """What is one parameter here (the rows of a tied head and embedding) must be one value in the file."""
    first: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in expected.items():
        twin = first.setdefault((tensor.data_ptr(), tensor.shape), name)
        if not torch.equal(found[twin], found[name]):
            raise CorruptError(
                f"{folder / TENSORS}: {twin} and {name} differ, but the model has one matrix for both",
                do="the adapter was made for a model whose embedding and head are apart",
            )


def _module_of(name: str) -> str:
    """The module that a low-rank factor belongs to; "" for another tensor."""
    found = re.match(r"(.*)\.lora_(?:embedding_)?A\b", name.removeprefix(PEFT_PREFIX))
    return "" if found is None else found[1]
