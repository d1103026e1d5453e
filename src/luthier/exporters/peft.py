"""peft: the adapter alone in a PEFT folder, beside its base.

Idea: what was trained is a few megabytes, and PEFT's format is what vLLM, SGLang, transformers and PEFT itself read.
The tensors are those of the run, bit for bit; with them go the tokenizer, the chat template and the stop tokens, which
a base's own folder does not have as they were trained. The check puts the files on a fresh copy of the base.

Equation: y = base(x) + adapter(x), with the factors in float32.

Source: PEFT 0.21, adapter_config.json and adapter_model.safetensors (peft.PeftModel.from_pretrained).

Cost: the bytes of the adapter on disk; for the check the base once more in memory, after the source was let go.

Use when: one base serves many adapters, or the base must stay untouched.

Not when: the program that will run it knows no adapters (merged, gguf), or the whole model was trained (merged).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import final

import torch
from pydantic import Field

from luthier.core.errors import RecipeError
from luthier.exporters import Exporter, Form, Subject, Told
from luthier.model.comparing.parity import Side
from luthier.model.comparing.parity_sides import ModelSide, folder_texts
from luthier.model.comparing.tolerances import EXACT, Tolerance
from luthier.model.files.adapter_config import CONFIG, EXTRAS, TENSORS, read_config, trained_beside
from luthier.model.files.json_files import write_object
from luthier.model.files.texts_beside import save_texts
from luthier.model.tasks import auto_class

_USE = """```python
from peft import PeftModel
from transformers import {model}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = PeftModel.from_pretrained({model}.from_pretrained("{base}"{classes}), "FOLDER")
```
"""
_OURS = "PEFT has no adapter of the kind {kind}: luthier reads it.\n"
_SPEAKS = """
`luthier generate {base} --adapter FOLDER --prompt "..."`
"""
_NOT_OF_PEFT = ("BOTTLENECK", "SPARSE")
"""Kinds that PEFT does not know."""


@final
class Peft(Exporter):
    """An adapter in a folder."""

    base: str = Field(
        default="", description="what the base is called where the adapter will be read; empty keeps its name here"
    )

    @property
    def form(self) -> Form:
        """The adapter beside its base."""
        return "adapter"

    @property
    def library(self) -> str:
        """What the hub calls it."""
        return "peft"

    def require(self, subject: Subject) -> None:
        """Raise RecipeError for a model without an adapter of its own."""
        if subject.adapter is None:
            raise RecipeError(
                f"{subject.name} has no adapter: all that was trained are the model's own weights",
                allowed="a run with an adapter that PEFT has files for",
                do="export the whole model: --to merged",
            )

    def dtype(self, subject: Subject) -> torch.dtype:
        """Factors are kept in float32."""
        return torch.float32

    def tolerance(self, subject: Subject) -> Tolerance:
        """None: the tensors are the very ones, on the same base."""
        return EXACT

    def needed_bytes(self, subject: Subject) -> int:
        """The bytes of the tensor file."""
        return 0 if subject.adapter is None else (subject.adapter / TENSORS).stat().st_size

    def write(self, subject: Subject, place: Path, told: Told) -> None:
        """Copy config and tensors, and write what lies beside them."""
        self.require(subject)
        folder = subject.adapter or place
        told("copying the adapter")
        for name in (TENSORS, EXTRAS):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, place / name)
        config = read_config(folder)
        write_object(place / CONFIG, {**config, "base_model_name_or_path": self.base or subject.base})
        save_texts(place, subject.model, subject.tokenizer, chat_template=subject.chat_template,
                   stop_ids=subject.stop_ids)  # fmt: skip

    def read(self, subject: Subject, place: Path) -> Side:
        """The files on a fresh copy of the base."""
        if subject.open_adapter is None:
            raise RecipeError(f"{subject.name} cannot be opened with another adapter", do="export it from its run")
        model = subject.open_adapter(place)
        renderer, stop_ids = folder_texts(place, subject.reading, context_tokens=model.context_tokens)
        return ModelSide("the adapter folder", model, renderer=renderer, stop_ids=stop_ids)

    def usage(self, subject: Subject) -> str:
        """Loading it with PEFT, where it knows the kind, and with luthier, where it says text."""
        task, base = subject.model.task, self.base or subject.base
        kind = None if subject.adapter is None else read_config(subject.adapter).get("peft_type")
        if kind in _NOT_OF_PEFT:
            use = _OURS.format(kind=kind)
        else:
            classes = f", num_labels={len(task.classes)}" if task.classes else ""
            use = _USE.format(base=base, model=auto_class(task).__name__, classes=classes)
        told = () if subject.adapter is None else trained_beside(subject.adapter)
        return use + (_SPEAKS.format(base=base) if task.speaks else "") + "".join(f"\n- {line}\n" for line in told)
