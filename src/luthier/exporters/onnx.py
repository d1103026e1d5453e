"""onnx: an encoder as an ONNX graph, for runtimes without Python or torch.

Idea: classifying and embedding are one pass, so an encoder is a plain graph of products that ONNX Runtime, OpenVINO,
TensorRT or a browser can run. The graph is traced from the zoo's own module with free sizes of batch and length, takes
ids, the mask and, where the model tells two texts apart, token types, and gives logits, or the last states for
embeddings. The check runs the graph in ONNX Runtime, at other lengths than it was traced with.

Equation: logits = head(encoder(ids, mask, types)); states = encoder(ids, mask, types).

Source: torch.onnx.export (the exporter of torch.export, opset 18 and up); onnxruntime.InferenceSession.

Cost: four bytes a weight on disk; in memory the model, its traced graph and, for the check, the session after it.

Use when: a classifier or an encoder shall run where neither torch nor a GPU is.

Not when: the model generates text (merged, gguf): a graph without a cache reads everything again for each token.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from luthier.core import optional
from luthier.core.errors import DataError, RecipeError
from luthier.data.conversation import Row
from luthier.data.forest import Ints
from luthier.data.rendering.renderer import Renderer
from luthier.exporters import Exporter, Subject, Told
from luthier.model.comparing.parity import Side
from luthier.model.comparing.parity_sides import folder_texts
from luthier.model.files.json_files import read_object, write_object
from luthier.model.files.old_keys import with_old_keys
from luthier.model.files.texts_beside import save_texts
from luthier.model.language_model import LanguageModel
from luthier.model.running.task_executor import takes_types
from luthier.model.tasks import kind_of

GRAPH = "model.onnx"
_INSIDE = 1_500_000_000
"""Bytes of weights that a file of protocol buffers, which ends at two gigabytes, can surely hold."""
_USE = """```python
import onnxruntime
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
session = onnxruntime.InferenceSession("FOLDER/model.onnx")
given = tokenizer(["A text."], return_tensors="np")
wanted = {{each.name for each in session.get_inputs()}}
[{outputs}] = session.run(None, {{name: each for name, each in given.items() if name in wanted}})
```
"""


@final
class Onnx(Exporter):
    """An encoder as a graph."""

    outputs: Literal["logits", "states"] = Field(
        default="logits", description="what the graph gives: logits of classes or words, or the last states of tokens"
    )

    @property
    def reads_head(self) -> bool:
        """Whether what was trained on top of the encoder is in it."""
        return self.outputs == "logits"

    @property
    def library(self) -> str:
        """What the hub calls it."""
        return "onnx"

    def require(self, subject: Subject) -> None:
        """Raise RecipeError for a model that generates, MissingError where a package is not installed."""
        if kind_of(subject.model.config) != "encoder":
            raise RecipeError(
                f"{subject.name} is a {subject.model.config.model_type} model, which generates text",
                allowed="encoders, such as a run with objective classification or masked_lm",
                do="--to merged or --to gguf",
            )
        for package in ("onnx", "onnxscript", "onnxruntime"):
            optional.require(package, extra="onnx", purpose="an ONNX graph")

    def dtype(self, subject: Subject) -> torch.dtype:
        """What every runtime computes in."""
        return torch.float32

    def write(self, subject: Subject, place: Path, told: Told) -> None:
        """The graph, the config with the names of classes, and the tokenizer."""
        model = subject.model
        told("tracing the graph")
        module = model.module.float()
        module.set_attn_implementation("eager")
        graph = _Graph(module, states=self.outputs == "states").eval()
        names = _inputs(model)
        example = tuple(torch.ones(2, 7, dtype=torch.int64) for _ in names)
        sizes = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("tokens", min=1)}
        with _quiet():
            torch.onnx.export(
                graph, example, str(place / GRAPH), input_names=list(names), output_names=[self.outputs], dynamo=True,
                dynamic_shapes={"given": tuple(sizes for _ in names)}, verbose=False,
                external_data=self.needed_bytes(subject) > _INSIDE,
            )  # fmt: skip
        module.config.save_pretrained(place)
        write_object(place / "config.json", with_old_keys(read_object(place / "config.json")))
        save_texts(place, model, subject.tokenizer, chat_template=None, stop_ids=())

    def read(self, subject: Subject, place: Path) -> Side:
        """The graph in ONNX Runtime on this CPU."""
        runtime = optional.require("onnxruntime", extra="onnx", purpose="reading an ONNX graph")
        session = runtime.InferenceSession(str(place / GRAPH), providers=["CPUExecutionProvider"])
        renderer, _ = folder_texts(place, subject.reading, context_tokens=subject.model.context_tokens)
        return _Session(session, renderer, states=self.outputs == "states")

    def usage(self, subject: Subject) -> str:
        """Running it with onnxruntime."""
        return _USE.format(outputs=self.outputs)


class _Graph(nn.Module):
    """What is traced: ids, mask and perhaps types, and one tensor out."""

    def __init__(self, module: Any, *, states: bool) -> None:
        super().__init__()
        self.module = module.base_model if states else module
        self.states = states

    def forward(self, *given: Int[Tensor, "batch tokens"]) -> Tensor:
        names = ("input_ids", "attention_mask", "token_type_ids")
        out = self.module(**dict(zip(names, given, strict=False)))
        found: Tensor = out.last_hidden_state if self.states else out.logits
        return found


@final
class _Session(Side):
    """A graph as ONNX Runtime runs it."""

    name = "the ONNX graph"

    def __init__(self, session: Any, renderer: Renderer, *, states: bool) -> None:
        self.session = session
        self.renderer = renderer
        self.gives = "states" if states else "logits"

    def logits(self, tokens: Ints) -> Float[np.ndarray, "n v"]:
        """What comes out for one text."""
        ids = tokens.astype(np.int64)[None]
        made = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        wanted = [each.name for each in self.session.get_inputs()]
        found = np.asarray(self.session.run(None, {name: made[name] for name in wanted})[0], np.float32)
        return found[0] if found.ndim == 3 else found

    def rendered(self, row: Row) -> tuple[Ints, ...] | None:
        """The row by the folder's own tokenizer; nothing for one that it refuses."""
        try:
            return tuple(view.tokens for view in self.renderer.render(row))
        except DataError:
            return ()

    def settings(self) -> dict[str, Any]:
        """How many tokens its tokenizer knows."""
        return {"tokenizer.tokens": self.renderer.tokenizer.vocabulary_size}


@contextmanager
def _quiet() -> Iterator[None]:
    """What torch's exporter says of its own insides is for its authors."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _inputs(model: LanguageModel) -> tuple[str, ...]:
    types = ("token_type_ids",) if takes_types(model.module) else ()
    return ("input_ids", "attention_mask", *types)
