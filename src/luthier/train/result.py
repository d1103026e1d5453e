"""The result of a run: what may be saved as one, and the folder it is saved in, whole or not at all.

An adapter is written in PEFT's format, trained base weights as a model folder, both with a manifest that lists every
file with its digest and says what the run claims of it. Numbers that are not finite, a run without trained tokens and
parameters that are still their start are refused before anything is written. Whether the files hold what is claimed
is for another process to prove (`recipes/proving/verify.py`); `release` makes room for it.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from luthier.adapters import Adapter
from luthier.core.errors import GateError, NumericError, StorageError
from luthier.model.editing.attachment import Attachment
from luthier.model.editing.edits import TrainedParameters
from luthier.model.files.adapter_config import save_extras
from luthier.model.files.adapter_files import save_adapter
from luthier.model.language_model import LanguageModel
from luthier.model.load import without_bars
from luthier.store.folder import write_folder
from luthier.store.runs import ADAPTER, MODEL
from luthier.train.stepper import Stepper

Format = Literal["peft", "transformers"]


@dataclass(frozen=True, kw_only=True)
class Claims:
    """What a run says of the weights it saves. `facts` are plain values that go into the manifest beside the rest."""

    start_digest: str
    trained_tokens: int
    steps: int
    last_loss: float | None
    eval_loss: float | None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def require_sound(self, attachment: Attachment) -> None:
        """Raise NumericError or GateError when these weights cannot be the result of a run."""
        for name, loss in (("training", self.last_loss), ("held-out", self.eval_loss)):
            if loss is not None and not math.isfinite(loss):
                raise NumericError(
                    f"the {name} loss of the result is {loss}; nothing was saved as result",
                    do="lower optimizer.learning_rate, look at the bad_step events, or use precision float32",
                )
        if self.trained_tokens <= 0:
            raise GateError(
                f"{self.trained_tokens} tokens were trained in {self.steps} steps; nothing was saved as result",
                do="look at the rows with: luthier data show",
            )
        if attachment.trained_digest() == self.start_digest:
            raise GateError(
                f"after {self.steps} steps the trained parameters are exactly what they were at the start; nothing was "
                "saved as result",
                do="look at optimizer.learning_rate, the budget and the count of trained tokens",
            )


def save_result(
    run: Path,
    model: LanguageModel,
    attachment: Attachment,
    adapter: Adapter,
    extras: Mapping[str, Any],
    *,
    claims: Claims | None = None,
    beside: Callable[[Path], None] | None = None,
) -> Path:
    """Write the trained adapter, or the trained model, into the folder `run`; the folder it went to.

    `beside` writes what goes with it (the tokenizer). It appears by one rename, verified. A run makes `claims` of it,
    and may replace what an earlier attempt to finish has left; without them nothing is replaced.
    """
    require_finite(attachment)
    if claims is not None:
        claims.require_sound(attachment)
    folder = run / (MODEL if attachment.trains_base else ADAPTER)
    facts = {"base": model.source, "base_digest": model.digest, "stop_ids": extras.get("stop_ids", [])}

    def write(place: Path) -> None:
        if attachment.trains_base:
            from luthier.model.zoo_again import zoo_module

            with without_bars(local=True):
                zoo_module(model.module).save_pretrained(place)
            save_extras(place, extras)
        else:
            save_adapter(
                place,
                attachment,
                peft_type=str(adapter.peft_type),
                config=adapter.peft_config(model.sites),
                base=model.source,
                task=model.task,
                extras={"base_digest": model.digest, **extras},
            )
        if beside is not None:
            beside(place)

    try:
        write_folder(
            folder,
            write,
            {**facts, **_claimed(claims), "format": format_of(attachment)},
            replace=claims is not None,
            needed_bytes=_size(model, attachment),
        )
    except StorageError as failure:
        again = f"luthier resume {run} writes it again" if claims is not None else "save it again"
        raise type(failure)(failure.received, allowed=failure.allowed, do=f"free space, then {again}") from failure
    return folder


def require_finite(attachment: Attachment) -> None:
    """Raise NumericError when a trained tensor holds a number that is not finite."""
    for name, tensor in attachment.named_tensors().items():
        if not bool(torch.isfinite(tensor).all()):
            raise NumericError(
                f"{name} of the result holds numbers that are not finite; nothing was saved as result",
                do="lower optimizer.learning_rate, or use precision float32",
            )


def format_of(attachment: Attachment) -> Format:
    """Whose format the result is in."""
    return "transformers" if attachment.trains_base else "peft"


@torch.no_grad()
def release(model: LanguageModel, stepper: Stepper | None = None) -> None:
    """Give back the memory of a model, its adapters and its optimizer; none of them can be used after this.

    What has been saved is loaded again by another process, and both need not be held at once.
    """
    held = [*model.module.parameters(), *model.module.buffers()]
    for edit in [edit for attachment in model.attachments.values() for edit in attachment.edits]:
        held += [*edit.parameters(), *edit.buffers()]
        if isinstance(edit, TrainedParameters):
            held += edit.originals.values()
    if stepper is not None:
        held += stepper.masters.values()
        for state in stepper.optimizer.state.values():
            held += [value for value in state.values() if isinstance(value, torch.Tensor)]
    for tensor in held:
        tensor.grad = None
        # In place: whoever else holds the tensor holds an empty one from now on.
        tensor.data = tensor.data.new_empty(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    # The C library keeps what was freed for later use of this process, unless it is asked.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _claimed(claims: Claims | None) -> dict[str, Any]:
    if claims is None:
        return {}
    return {
        **claims.facts,
        "trained_tokens": claims.trained_tokens,
        "steps": claims.steps,
        "last_loss": claims.last_loss,
        "eval_loss": claims.eval_loss,
    }


def _size(model: LanguageModel, attachment: Attachment) -> int:
    """Bytes of the tensors that will be written."""
    if not attachment.trains_base:
        return sum(4 * tensor.numel() for tensor in attachment.named_tensors().values())
    return sum(parameter.nbytes for parameter in model.module.parameters())
