"""Sides of a parity check that are models of transformers: in memory, with or without an adapter, or in a folder.

Idea: a model without a learned root is asked through the zoo's own forward, which is what everybody else will run. A
learned root is no module of the zoo, so with one our executor answers, with the log-probability of each token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from luthier.core.errors import DataError
from luthier.data.conversation import Row
from luthier.data.forest import Forest, Ints, Segment, Tree
from luthier.data.prepare import Reading, make_renderer
from luthier.data.rendering.renderer import Renderer
from luthier.data.tokenizer import Tokenizer
from luthier.model.comparing.parity import Gives, Side
from luthier.model.comparing.sketches import Sketch
from luthier.model.comparing.streamed import StreamedModel
from luthier.model.files.generation_files import read_stop_ids
from luthier.model.language_model import LanguageModel
from luthier.model.load import Precision, load_model
from luthier.model.packed import packing_of
from luthier.model.running.encoder_decoder import start_of
from luthier.model.tasks import CAUSAL, Task, kind_of
from luthier.model.zoo import ZooConfig

_NAMES_ONLY: Final = ("architectures", "attn_implementation", "dtype", "id2label", "label2id", "name_or_path",
                      "quantization_config", "torch_dtype", "transformers_version", "use_cache")  # fmt: skip
"""Keys of a config that change nothing of what is computed. Of classes the names are compared on their own."""


class SpokenSide(Side):
    """A side with a tokenizer and a template, where it has any: `renderer` makes tokens of rows."""

    def __init__(self, name: str, renderer: Renderer | None, stop_ids: Iterable[int] | None) -> None:
        self.name = name
        self.renderer = renderer
        self._stop_ids = None if stop_ids is None else frozenset(stop_ids)

    def rendered(self, row: Row) -> tuple[Ints, ...] | None:
        """The row as its own tokenizer and template render it; nothing for one that it refuses."""
        if self.renderer is None:
            return None
        try:
            return tuple(view.tokens for view in self.renderer.render(row))
        except DataError:
            return ()

    def stop_ids(self) -> frozenset[int] | None:
        """Where its answers end."""
        return self._stop_ids


@final
class ModelSide(SpokenSide):
    """A model in memory, with what is attached to it.

    With `states` its last states are what it gives, whatever head lies on top of them.
    """

    def __init__(
        self,
        name: str,
        model: LanguageModel,
        *,
        renderer: Renderer | None = None,
        stop_ids: Iterable[int] | None = None,
        states: bool = False,
    ) -> None:
        super().__init__(name, renderer, stop_ids)
        self.states = states
        self.model = model
        rooted = model.active_root is not None and not model.task.classifies
        self.gives: Gives = "states" if rooted or states else "logits"

    @torch.no_grad()
    def logits(self, tokens: Ints) -> Float[np.ndarray, "n v"]:
        """At each token what comes next, or is filled in; the classes of the text or of each token."""
        self.model.train(False)
        if self.model.active_root is not None:
            return self._with_root(tokens)
        module = self.model.module
        ids = torch.from_numpy(tokens.astype(np.int64))[None].to(self.model.device)
        given = {"input_ids": ids}
        if self.states:
            states: Tensor = module.base_model(**given).last_hidden_state[0]
            return states.float().cpu().numpy()
        if self.model.task.name == "seq2seq_lm":
            begin = torch.full_like(ids[:, :1], start_of(module))
            given["decoder_input_ids"] = torch.cat([begin, ids[:, :-1]], 1)
        found: Tensor = module(**given).logits
        return (found[0] if found.ndim == 3 else found).float().cpu().numpy()

    def stop_ids(self) -> frozenset[int] | None:
        """Where its answers end, for a model that says text."""
        return self._stop_ids if self.model.task.speaks else None

    def settings(self) -> Mapping[str, Any]:
        """What its config says of how it computes, and how many tokens its tokenizer knows."""
        known = {} if self.renderer is None else {"tokenizer.tokens": self.renderer.tokenizer.vocabulary_size}
        return {**settings_of(self.model.config), **known}

    def tensors(self) -> Iterable[tuple[str, Tensor]]:
        """Its weights by their names in the zoo; none while something is attached, or packed, and goes by others."""
        named = dict(self.model.module.named_parameters(remove_duplicate=False))
        if self.model.attachments or any(packing_of(each) is not None for each in named.values()):
            return ()
        return named.items()

    def _with_root(self, tokens: Ints) -> Float[np.ndarray, "n v"]:
        """The log-probability of each token behind the first one, as a column; of classes, those of all."""
        outputs = self.model.token_outputs(Forest((_tree(tokens, self.model),)))
        found = outputs.classes if outputs.classes is not None else outputs.log_probs[:, None]
        return found.float().cpu().numpy()


@final
class StreamedSide(SpokenSide):
    """A model that is never whole in memory; all `prompts` go through it at once. Without a `model` it has texts alone.

    It is not `bare` where something beside its tensors computes, so that they are not what is to be compared.
    """

    def __init__(
        self,
        name: str,
        model: StreamedModel | None,
        prompts: Sequence[Ints],
        *,
        renderer: Renderer | None = None,
        stop_ids: Iterable[int] | None = None,
        bare: bool = True,
    ) -> None:
        super().__init__(name, renderer, stop_ids)
        self.model, self.prompts, self.bare = model, prompts, bare
        # No cached_property: Python 3.11 has one lock for those of all objects, and two sides answer at once.
        self._answers: dict[bytes, Float[np.ndarray, "n v"]] = {}

    def logits(self, tokens: Ints) -> Float[np.ndarray, "n v"]:
        """At each token what comes next."""
        if not self._answers:
            found = [] if self.model is None else self.model.logits(self.prompts)
            self._answers = {prompt.tobytes(): each for prompt, each in zip(self.prompts, found, strict=True)}
        return self._answers[tokens.tobytes()]

    def settings(self) -> Mapping[str, Any]:
        """What its config says of how it computes."""
        return {} if self.model is None else settings_of(self.model.module.config)

    def sketches(self) -> Mapping[str, Sketch]:
        """Its weights by the names of its files."""
        return self.model.sketches() if self.model is not None and self.bare else {}


def folder_side(
    folder: Path,
    reading: Reading,
    *,
    name: str = "",
    task: Task = CAUSAL,
    precision: Precision = "auto",
    device: str = "auto",
) -> ModelSide:
    """A model folder as anybody finds it: its own weights, tokenizer, chat template and stop tokens.

    `reading` says how rows are read for the source; the template is the folder's own whatever it says. Raises as
    `load_model` does for a folder that does not hold a whole model.
    """
    model = load_model(str(folder), precision=precision, device=device, task=task)
    renderer, stop_ids = folder_texts(folder, reading, context_tokens=model.context_tokens)
    return ModelSide(name or folder.name, model, renderer=renderer, stop_ids=stop_ids)


def folder_texts(
    folder: Path, reading: Reading, *, context_tokens: int | None = None
) -> tuple[Renderer, frozenset[int]]:
    """How the tokenizer and the template in a folder render rows, and where answers end by its files."""
    tokenizer = Tokenizer.load(folder)
    renderer, _ = make_renderer(tokenizer, replace(reading, template="auto"), context_tokens=context_tokens)
    return renderer, tokenizer.stop_ids | read_stop_ids(folder)


def settings_of(config: ZooConfig) -> dict[str, Any]:
    """What a config says of how a model computes, as plain values by dotted keys."""
    found: dict[str, Any] = {}
    _flatten(config.to_dict(), "", found)
    if config.id2label:
        found["classes"] = [str(name) for name in config.id2label.values()]
    return found


def _flatten(values: Mapping[str, Any], start: str, found: dict[str, Any]) -> None:
    for key, value in values.items():
        if key in _NAMES_ONLY or key.startswith("_"):
            continue
        if isinstance(value, Mapping):
            _flatten(value, f"{start}{key}.", found)
        else:
            found[start + key] = list(value) if isinstance(value, tuple) else value


def _tree(tokens: Ints, model: LanguageModel) -> Tree:
    """A prompt as a tree of the model's task, every token of which carries weight."""
    weights = np.ones(len(tokens), np.float32)
    if model.task.name == "seq2seq_lm":
        answer = np.concatenate([np.array([start_of(model.module)], np.int32), tokens])
        said = Segment(answer, np.concatenate([np.zeros(1, np.float32), weights]), 0)
        return Tree((Segment(tokens, np.zeros_like(weights), both_ways=True), said))
    if model.task.classifies:
        single = np.zeros_like(weights)
        single[0 if kind_of(model.config) == "encoder" else -1] = 1
        own = weights if model.task.name == "token_classes" else single
        return Tree((Segment(tokens, own, labels=np.zeros_like(tokens)),))
    return Tree((Segment(tokens, weights, labels=tokens if model.task.name == "masked_lm" else None),))
