"""The tensors of an adapter in PEFT's format, both ways; what its config says is in `adapter_config.py`.

Loading is strict: every tensor is used, every expected one is there, shapes agree, and the base is the same one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from luthier.core.errors import CorruptError, DriftError
from luthier.model.editing.attachment import Attachment
from luthier.model.files.adapter_config import CONFIG, TENSORS, read_extras, save_extras
from luthier.model.files.json_files import write_object
from luthier.model.files.tensor_files import load_tensors
from luthier.model.language_model import LanguageModel
from luthier.model.tasks import CAUSAL, PEFT_TYPES, Task


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
