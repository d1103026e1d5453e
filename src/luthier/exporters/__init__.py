"""Exporters: the forms in which a tuned model leaves the workshop.

The contract: an exporter writes one form of a model (a PEFT folder, a Hugging Face folder, a GGUF file) into a folder
that nobody sees yet, and says how the program that reads this form hears it again: as a side of a parity check. It
never sees a run, a recipe or a card. Who calls it has opened the model and folded the adapter in where the form is of
whole weights, asks the source before and the artefact after, keeps the folder only when the two agree, and writes the
numbers and the model card beside.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

import torch

from luthier.core.knobs import Method
from luthier.data.prepare import Reading
from luthier.data.tokenizer import Tokenizer
from luthier.model.comparing.parity import Side
from luthier.model.comparing.tolerances import Tolerance, tolerance_for
from luthier.model.language_model import LanguageModel
from luthier.model.load import Precision

Told = Callable[[str], None]
"""Hears what is being done, for a person who waits."""
Form = Literal["weights", "adapter"]


@final
@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is exported.

    Where an exporter takes weights, `model` is whole and plain: adapter folded in, nothing attached, nothing packed;
    `was_packed` says that its base computed with packed weights until then. Where it takes the adapter, that is on the
    model, and lies in the folder `adapter` in PEFT's format (None where a model has none); `open_adapter` loads the
    base anew, with the adapter of another folder on it.

    `base` is the base model as a config names it. `chat_template` is the one that was trained with, None where there
    is none; `stop_ids` are where answers end. `reading` says how rows are read for the model, `precision` is
    what the source computed in: an artefact is asked in the same, so that only its own rounding is seen.
    """

    name: str
    base: str
    model: LanguageModel
    tokenizer: Tokenizer
    chat_template: str | None
    stop_ids: tuple[int, ...]
    reading: Reading
    precision: Precision
    adapter: Path | None = None
    open_adapter: Callable[[Path], LanguageModel] | None = None
    was_packed: bool = False


class Exporter(Method):
    """A form in which a model is given away."""

    @property
    def form(self) -> Form:
        """Whether it takes whole weights or the adapter beside its base."""
        return "weights"

    @property
    def library(self) -> str:
        """What the hub calls the library that reads it."""
        return "transformers"

    @property
    def reads_head(self) -> bool:
        """Whether the artefact holds what lies on top of the model: without, states are compared, not logits."""
        return True

    def require(self, subject: Subject) -> None:
        """Raise now for what cannot be written in this form: MissingError for a package, RecipeError for a model.

        Called before anything is computed; `subject.model` is still as it was opened.
        """

    def dtype(self, subject: Subject) -> torch.dtype:
        """The type in which most weights are written, before any packing."""
        return subject.model.dtype

    def tolerance(self, subject: Subject) -> Tolerance:
        """How far the artefact may be from the source."""
        return tolerance_for(self.dtype(subject), computed=subject.precision)

    def needed_bytes(self, subject: Subject) -> int:
        """About what it will take on the disk."""
        count = sum(parameter.numel() for parameter in subject.model.module.parameters())
        return count * self.dtype(subject).itemsize

    @abstractmethod
    def write(self, subject: Subject, place: Path, told: Told) -> None:
        """Write all files into the folder `place`, which is there and empty."""

    @abstractmethod
    def read(self, subject: Subject, place: Path) -> Side:
        """The artefact as whoever reads it has it, from its files alone.

        The weights of `subject.model` have been let go by then; its config and the rest of `subject` are there. Raises
        CorruptError or RecipeError for files that hold no whole model, which the gate tells as its own.
        """

    @abstractmethod
    def usage(self, subject: Subject) -> str:
        """How the artefact is used, as Markdown for the model card; its folder is called FOLDER there."""
