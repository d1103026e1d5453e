"""What an export to GGUF writes and how it is asked: a whole model, or an adapter beside its base.

Use through an exporter: it says which part, in which number format, and of what.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal, final

import torch

from luthier.core import optional
from luthier.core.errors import RecipeError
from luthier.data.prepare import Reading, make_renderer
from luthier.data.tokenizer import Tokenizer
from luthier.model.attending import attention
from luthier.model.comparing.parity import Side
from luthier.model.comparing.parity_sides import ModelSide
from luthier.model.comparing.tolerances import BRAIN, EXACT, HALF, Tolerance
from luthier.model.files.adapter_config import EXTRAS, trained_beside
from luthier.model.files.weights import module_with
from luthier.model.gguf.families import EXTRA, PURPOSE, Layout, family_of, is_matrix_to_pack
from luthier.model.gguf.formats import Choice, format_for
from luthier.model.gguf.lora_file import lora_to_peft, require_writable, write_lora
from luthier.model.gguf.model_file import (
    Model,
    config_of_file,
    model_keys,
    notices_of,
    read_weights_back,
    tokenizer_of_file,
    write_model,
)
from luthier.model.gguf.reading import GgufFile
from luthier.model.language_model import LanguageModel
from luthier.model.load import without_bars
from luthier.model.tasks import CAUSAL

Part = Literal["model", "adapter"]
MODEL_FILE: Final = "model.gguf"
ADAPTER_FILE: Final = "adapter.gguf"
TOLERANCES: Final[dict[Choice, Tolerance]] = {
    "F32": EXACT,
    "F16": HALF,
    "BF16": BRAIN,
    "Q8_0": Tolerance(form="weights in Q8_0", difference=0.7, kl=5e-3, tie=0.15, weights=0.03),
    "Q4_K": Tolerance(form="weights in Q4_K", difference=4.0, kl=0.1, tie=0.5, weights=0.2),
    "Q4_0": Tolerance(form="weights in Q4_0", difference=8.0, kl=0.5, tie=1.0, weights=0.2),
}
"""How far a file may be from its source, by format."""


@final
@dataclass(frozen=True, kw_only=True)
class GgufPart:
    """One part of what is exported, and all that belongs to it; `model` has the weights until the file is written.

    `adds_bos` says whether readers put BOS before every text; None for as the tokenizer does.
    """

    part: Part
    type: Choice
    name: str
    model: LanguageModel
    tokenizer: Tokenizer
    template: str | None
    stop_ids: tuple[int, ...]
    reading: Reading
    adapter: Path | None
    open_adapter: Callable[[Path], LanguageModel] | None
    adds_bos: bool | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The type that weights are packed from; an adapter's in float32."""
        return torch.float32 if self.part == "adapter" else self.model.dtype

    def require(self) -> None:
        """Raise MissingError without the package, RecipeError for a model or adapter that GGUF has no place for."""
        optional.require("gguf", extra=EXTRA, purpose=PURPOSE)
        family_of(self.model.config)
        if self.model.task.name != CAUSAL.name:
            raise RecipeError(f"the model is for the task {self.model.task.name}", allowed="models that say text",
                              do="export it with --to merged")  # fmt: skip
        if self.part == "model":
            model_keys(self._model(), self.type)
        else:
            require_writable(self._adapter(), self.model.config)

    def tolerance(self, source: Tolerance) -> Tolerance:
        """Of the number format and of the precision that is computed in, whichever rounds more; an adapter is exact."""
        return (EXACT if self.part == "adapter" else TOLERANCES[self.type]).loosest(source)

    def needed_bytes(self) -> int:
        """About what the file takes, from shapes alone."""
        if self.part == "adapter":
            return sum(path.stat().st_size for path in self._adapter().glob("*.safetensors"))
        return file_bytes(self.model, self.type)

    def write(self, place: Path, told: Callable[[str], None]) -> None:
        """The file."""
        if self.part == "adapter":
            write_lora(place / ADAPTER_FILE, self._adapter(), self.model.config, name=self.name, told=told)
        else:
            write_model(place / MODEL_FILE, self._model(), self.type, told=told)

    def read(self, place: Path) -> Side:
        """The file through our own reader, which knows nothing of what was written."""
        if self.part == "model":
            return model_side(place / MODEL_FILE, self.model, self.reading, ends=bool(self.stop_ids))
        if self.open_adapter is None:
            raise RecipeError(f"{self.name} cannot be opened with another adapter", do="export it from its run")
        return adapter_side(place / ADAPTER_FILE, self.model, self.open_adapter, extras=self._adapter() / EXTRAS)

    def notices(self) -> str:
        """What a user should know of the file, as a list in Markdown; empty where there is nothing."""
        found = notices_of(self._model(), self.type) if self.part == "model" else trained_beside(self._adapter())
        return "".join(f"\n- {line}" for line in found) + ("\n" if found else "")

    def _model(self) -> Model:
        return Model(name=self.name, config=self.model.config, tensors=self.model.module.state_dict(),
                     tokenizer=self.tokenizer, template=self.template, stop_ids=self.stop_ids,
                     adds_bos=self.adds_bos)  # fmt: skip

    def _adapter(self) -> Path:
        if self.adapter is None:
            raise RecipeError(f"{self.name} has no adapter", allowed="a run with a LoRA adapter",
                              do="export the whole model: --set exporter.part=model")  # fmt: skip
        return self.adapter


def file_bytes(model: LanguageModel, choice: Choice) -> int:
    """About what a model takes in a format, from its shapes alone."""
    layout = Layout.of(model.config)
    layers, total = int(model.config.num_hidden_layers), 0
    for own, parameter in model.module.named_parameters():
        name = layout.named(own) or own
        shape = tuple(parameter.shape)
        kind = format_for(name, shape, choice, layers=layers, tied=layout.tied)
        total += parameter.numel() // kind.block * kind.bytes if is_matrix_to_pack(name, shape) else 4 * shape[0]
    # The words of a vocabulary with its merges.
    return total + 40 * int(model.config.vocab_size)


def model_side(path: Path, model: LanguageModel, reading: Reading, *, ends: bool) -> Side:
    """A file as a reader has it: its weights, settings, tokenizer, template, and where answers end if they do.

    `model` is the source, whose weights may be gone: its config says what the header has no key for. Raises
    CorruptError for a file that holds no whole model.
    """
    attention.register()
    file = GgufFile.open(path)
    config = config_of_file(file, model.config)
    tensors = read_weights_back(file, config)
    with without_bars(local=True):
        loaded = module_with(config, tensors, model.dtype, str(path), task=CAUSAL, seed=0)
    loaded.module.to(model.device)
    read = LanguageModel(loaded.module.eval(), source=str(path), digest="")
    tokenizer, stop_ids = tokenizer_of_file(file)
    renderer, _ = make_renderer(tokenizer, replace(reading, template="auto"), context_tokens=read.context_tokens)
    return ModelSide("the GGUF file", read, renderer=renderer, stop_ids=stop_ids if ends else None)


def adapter_side(
    path: Path, model: LanguageModel, open_adapter: Callable[[Path], LanguageModel], *, extras: Path
) -> Side:
    """An adapter's file on a fresh copy of its base, which is packed as `extras` says that it was in training.

    Raises CorruptError for a file that holds no adapter for it.
    """
    with tempfile.TemporaryDirectory(prefix="luthier-gguf-") as folder:
        lora_to_peft(GgufFile.open(path), model.config, Path(folder))
        if extras.is_file():
            shutil.copyfile(extras, Path(folder) / EXTRAS)
        return ModelSide("the GGUF adapter", open_adapter(Path(folder)))
