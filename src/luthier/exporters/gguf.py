"""gguf: one file for llama.cpp, LM Studio and all that is built on it; the whole model or its LoRA adapter.

Idea: the file holds weights, tokenizer, chat template and where answers end; nothing is compiled and no other program
is needed. Weights go through one after another, each in its number format. What llama.cpp would compute differently
from the model as it was trained (a window, a scaling, an activation, how a text is cut) is refused before anything is
written, and the written file is read back and asked what the model was asked.

Equation: Q8_0: x ~ d q with 32 numbers to a scale; Q4_0: 4 bits; Q4_K: 4 bits with scales of 6 bits, the mix that is
called Q4_K_M (six bits for the head and half of the value and down projections); F32, F16, BF16: rounded once.

Source: the GGUF format, version 3, and the names of the gguf package; maths/ggml.py for the formats,
model/gguf/families.py for the order of rows.

Cost: bytes per weight: F32 4, F16 and BF16 2, Q8_0 1.06, Q4_K about 0.6, Q4_0 about 0.57; memory for one tensor beside
the model.

Use when: the model is to run on a laptop, or in a program that takes GGUF.

Not when: it is to be trained further or merged (merged), or one base serves many adapters of other kinds than LoRA.
"""

from __future__ import annotations

from pathlib import Path
from typing import final

import torch
from pydantic import Field

from luthier.exporters import Exporter, Form, Subject, Told
from luthier.model.comparing.parity import Side
from luthier.model.comparing.tolerances import Tolerance
from luthier.model.gguf.formats import Choice
from luthier.model.gguf.parts import GgufPart, Part

_USE = """```bash
llama-cli -m FOLDER/model.gguf
```

`llama-server -m FOLDER/model.gguf --jinja` serves it with the chat template that the file holds.
"""
_USE_ADAPTER = """```bash
llama-cli -m BASE.gguf --lora FOLDER/adapter.gguf
```

BASE.gguf is {base} as a GGUF file of any format.
"""


@final
class Gguf(Exporter):
    """A GGUF file."""

    type: Choice = Field(default="Q8_0", description="number format of the matrices; an adapter is always in F32")
    part: Part = Field(default="model", description="the whole model, or the LoRA adapter beside its base")

    @property
    def form(self) -> Form:
        """The adapter where that is the part, otherwise whole weights."""
        return "adapter" if self.part == "adapter" else "weights"

    @property
    def library(self) -> str:
        """What the hub calls it."""
        return "gguf"

    def require(self, subject: Subject) -> None:
        """Raise MissingError without the package, RecipeError for a model or adapter that GGUF has no place for."""
        self._parts(subject).require()

    def dtype(self, subject: Subject) -> torch.dtype:
        """The type that weights are packed from; an adapter's in float32."""
        return self._parts(subject).dtype

    def tolerance(self, subject: Subject) -> Tolerance:
        """Of the number format; an adapter's factors are the very ones, turned."""
        return self._parts(subject).tolerance(super().tolerance(subject))

    def needed_bytes(self, subject: Subject) -> int:
        """From the shapes, in the format."""
        return self._parts(subject).needed_bytes()

    def write(self, subject: Subject, place: Path, told: Told) -> None:
        """One file."""
        self._parts(subject).write(place, told)

    def read(self, subject: Subject, place: Path) -> Side:
        """The file through our own reader, which knows nothing of what was written."""
        return self._parts(subject).read(place)

    def usage(self, subject: Subject) -> str:
        """With llama.cpp, and what there is to know of the file."""
        use = _USE if self.part == "model" else _USE_ADAPTER.format(base=subject.base)
        return use + self._parts(subject).notices()

    def _parts(self, subject: Subject) -> GgufPart:
        return GgufPart(
            part=self.part,
            type=self.type,
            name=Path(subject.name).name or "model",
            model=subject.model,
            tokenizer=subject.tokenizer,
            template=subject.chat_template,
            stop_ids=subject.stop_ids,
            reading=subject.reading,
            adapter=subject.adapter,
            open_adapter=subject.open_adapter,
        )
