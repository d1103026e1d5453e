"""ollama: a GGUF file and the Modelfile that makes `ollama create` of it a model that chats as it was trained.

Idea: Ollama does not run the model's own chat template but one in Go's language. It is derived here by asking the real
one (what stands between two messages, by their roles), and held against it id by id on conversations; a template that
the language has no words for is refused. Stop tokens, sampling settings and a system message go in as parameters.

Equation: text(m_1 .. m_n) = E(start, r_1) m_1 E(r_1, r_2) m_2 ... E(r_n, answer), with the pieces E taken from the
model's own template.

Source: Ollama's Modelfile and template documentation; data/rendering/go_chat.py. The GGUF file is that of `gguf`.

Cost: as gguf; some ten renderings of the template.

Use when: the model is to be run by Ollama, or by what takes its Modelfiles.

Not when: the chat has tools, or a template that does more than put texts between messages: llama-server runs the
template that is in the GGUF file.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import final

import torch
from pydantic import Field

from luthier.core.errors import RecipeError
from luthier.exporters import Exporter, Form, Subject, Told
from luthier.model.comparing.parity import Side
from luthier.model.comparing.tolerances import Tolerance
from luthier.model.gguf.formats import Choice
from luthier.model.gguf.modelfile import NAME, Modelfile, modelfile
from luthier.model.gguf.parts import ADAPTER_FILE, MODEL_FILE, GgufPart, Part

_USE = """```bash
ollama create my-model -f FOLDER/Modelfile
ollama run my-model
```
"""


@final
class Ollama(Exporter):
    """A folder for `ollama create`."""

    type: Choice = Field(default="Q8_0", description="number format of the matrices; an adapter is always in F32")
    part: Part = Field(default="model", description="the whole model, or the LoRA adapter beside its base")
    base: str = Field(default="", description="what Ollama calls the base; needed for an adapter, as in qwen2.5:0.5b")
    system: str = Field(default="", description="system message of chats that bring none; empty for none")

    @property
    def form(self) -> Form:
        """The adapter where that is the part, otherwise whole weights."""
        return "adapter" if self.part == "adapter" else "weights"

    @property
    def library(self) -> str:
        """What the hub calls it."""
        return "gguf"

    def require(self, subject: Subject) -> None:
        """Raise MissingError without the package, RecipeError or TemplateError for what has no such form."""
        self._parts(subject).require()
        if self.part == "adapter" and not self.base:
            raise RecipeError(
                f"{subject.name} is exported as an adapter, and no base is named",
                allowed="the name that Ollama has for the base, or the path of its GGUF file",
                do="name it: --set exporter.base=NAME, or export the whole model",
                where="exporter.base",
            )
        self._modelfile(subject)

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
        """The GGUF file and the Modelfile."""
        told("writing the chat template in Ollama's language")
        made = self._modelfile(subject)
        (place / NAME).write_text(made.text, encoding="utf-8")
        replace(self._parts(subject), adds_bos=made.adds_bos).write(place, told)

    def read(self, subject: Subject, place: Path) -> Side:
        """The GGUF file through our own reader; the Modelfile's template was checked when it was made."""
        return self._parts(subject).read(place)

    def usage(self, subject: Subject) -> str:
        """With Ollama."""
        return _USE + self._parts(subject).notices()

    def _modelfile(self, subject: Subject) -> Modelfile:
        settings = subject.model.module.generation_config
        return modelfile(
            base=f"./{MODEL_FILE}" if self.part == "model" else self.base,
            adapter="" if self.part == "model" else f"./{ADAPTER_FILE}",
            tokenizer=subject.tokenizer,
            template=subject.chat_template,
            stop_ids=subject.stop_ids,
            generation={} if settings is None else settings.to_diff_dict(),
            system=self.system,
        )

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
