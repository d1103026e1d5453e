"""The result of a run: saved, reloaded strictly, and shown to reproduce the loss that was reported.

An adapter is written in PEFT's format, trained base weights as a model folder. What was written is then read back into
freshly made edits on the same base, and the held-out loss is computed again; a difference is an error, not a note.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from luthier.adapters import Adapter
from luthier.core.errors import CorruptError, GateError, StorageError
from luthier.data.forest import Tree
from luthier.model.adapter_files import fill, save_adapter, save_extras
from luthier.model.attachment import Attachment
from luthier.model.language_model import LanguageModel
from luthier.model.load import without_bars
from luthier.train.stepper import Stepper

ADAPTER = "adapter"
MODEL = "model"
LOSS_TOLERANCE = 1e-5
"""Relative difference allowed between the loss reported and the loss of the reloaded file; the bytes are the same."""


@dataclass(frozen=True)
class Proof:
    """What was checked of a saved result."""

    folder: str
    tensors: int
    changed: bool
    eval_loss: float | None
    reloaded_loss: float | None


def save_result(
    run: Path, model: LanguageModel, attachment: Attachment, adapter: Adapter, extras: Mapping[str, Any]
) -> Path:
    """Write the trained adapter, or the trained model, into the run directory; the folder it went to."""
    folder = run / (MODEL if attachment.trains_base else ADAPTER)
    try:
        if attachment.trains_base:
            with without_bars(local=True):
                model.module.save_pretrained(folder)
            save_extras(folder, extras)
        else:
            save_adapter(
                folder,
                attachment,
                peft_type=str(adapter.peft_type),
                config=adapter.peft_config(model.sites),
                base=model.source,
                extras={"base_digest": model.digest, **extras},
            )
    except (OSError, SafetensorError) as failure:
        raise StorageError(
            f"cannot write {folder}: {failure}", do="look at the free space; then luthier resume writes it again"
        ) from failure
    return folder


def prove_result(
    folder: Path,
    attachment: Attachment,
    stepper: Stepper,
    *,
    start_digest: str,
    eval_trees: Sequence[Tree],
    eval_loss: float | None,
) -> Proof:
    """Reload what was saved and compare. Raises GateError when the result is not what the run reported.

    The adapter must differ from its start, every tensor of the file must find its place, and the held-out loss must
    come out again.
    """
    if attachment.digest() == start_digest:
        raise GateError(
            "the trained parameters are exactly what they were at the start",
            do="look at the learning rate, the budget and the trained token count",
        )
    if attachment.trains_base:
        count = _reload_model(folder, attachment)
    else:
        fill(attachment, folder)
        count = len(attachment.named_tensors())
    reloaded = None
    if eval_trees and eval_loss is not None:
        reloaded = stepper.evaluate(eval_trees).loss
        if not math.isclose(reloaded, eval_loss, rel_tol=LOSS_TOLERANCE, abs_tol=LOSS_TOLERANCE):
            raise GateError(
                f"the saved result has a held-out loss of {reloaded:.6f}, the run reported {eval_loss:.6f}",
                do="do not use it; report this with the run's recipe.yaml",
            )
    return Proof(str(folder), count, True, eval_loss, reloaded)


@torch.no_grad()
def _reload_model(folder: Path, attachment: Attachment) -> int:
    """Read the saved model's tensors back into the trained parameters."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    count = 0
    seen: set[int] = set()
    for name, parameter in attachment.named_parameters().items():
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        # A tied parameter is saved once, under whichever of its names the zoo chose.
        found = tensors.get(name.replace("/", "."))
        if found is None:
            raise CorruptError(f"{folder} lacks {name.replace('/', '.')}", do="the saved model is not complete")
        if found.shape != parameter.shape:
            raise CorruptError(f"{name} was saved with shape {tuple(found.shape)}", allowed=str(tuple(parameter.shape)))
        parameter.copy_(found)
        count += 1
    return count
