"""The models that are merged: their tensors as a stream, with an adapter's changes added on the way.

Idea: a parent is a folder of shards, its config, and perhaps LoRA factors. Rows are asked for in float32; where factors
belong to a tensor their product is added to the rows as they come, so that a tuned adapter is merged without a folder
of its weights. Rows that a parent's vocabulary does not have are filled from those that have them (`vocabulary.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

import numpy as np
from jaxtyping import Float, Int

from luthier.core.errors import RecipeError
from luthier.data.hub import ModelFiles
from luthier.kernels.floats import widened
from luthier.merge.lora import Factors, factors_of
from luthier.model.files.old_keys import with_old_keys
from luthier.model.files.shards import Shards
from luthier.model.files.sources import without_config
from luthier.model.files.weight_files import folder_digest, weight_files

TOKENIZER: Final = "tokenizer.json"
_SAME: Final = ("model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act",
                "tie_word_embeddings", "num_experts_per_tok")  # fmt: skip
_TOLD: Final = ("rope_theta", "rope_scaling", "rope_parameters", "rms_norm_eps", "sliding_window", "layer_types")


@final
@dataclass
class Parent:
    """A model that is merged. `name` is what the user called it; `adapter` are the files of one on top of it."""

    name: str
    shards: Shards
    config: dict[str, Any]
    files: ModelFiles
    adapter: ModelFiles | None = None
    factors: Mapping[str, Factors] = field(default_factory=dict)

    @classmethod
    def open(cls, name: str, source: str, adapter: Path | None = None) -> Parent:
        """Open the files of a model, without reading a tensor. Raises RecipeError for one whose weights are packed."""
        files = ModelFiles.of(source)
        config = files.json("config.json")
        if not config:
            raise without_config(name, files)
        if config.get("quantization_config"):
            raise RecipeError(
                f"{name} holds packed weights (its config.json has quantization_config)",
                allowed="weights in float32, bfloat16 or float16",
                do="merge the version that is not quantized, and quantize the result",
            )
        shards = Shards(source)
        try:
            factors = {} if adapter is None else factors_of(adapter, shards.slots)
        except BaseException:
            shards.close()
            raise
        return cls(name, shards, config, files, None if adapter is None else ModelFiles.of(adapter), factors)

    @property
    def text_config(self) -> dict[str, Any]:
        """The config of the language model, which may lie inside that of a larger one."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config

    def digests(self) -> tuple[str, str]:
        """What identifies its weights, and the adapter on top: sha256 of their files; empty where there is none."""
        weights = folder_digest(weight_files(self.files)[0].parent)
        return weights, "" if self.adapter is None else folder_digest(Path(self.adapter.source))

    @property
    def layers(self) -> int:
        """How many layers the config says there are; 0 where it does not."""
        for key in ("num_hidden_layers", "n_layer", "num_layers"):
            if isinstance(count := self.text_config.get(key), int):
                return count
        return 0

    @property
    def texts(self) -> ModelFiles:
        """The files of tokenizer and template: an adapter that brings its own was trained with them."""
        own = self.adapter
        return own if own is not None and own.find(TOKENIZER) is not None else self.files

    def find(self, name: str) -> Path | None:
        """A file that either may have, the adapter's before the model's."""
        own = None if self.adapter is None else self.adapter.find(name)
        return self.files.find(name) if own is None else own

    def rows(self, name: str, first: int, last: int) -> Float[np.ndarray, "rows columns"]:
        """Rows of a tensor in float32, what an adapter changes included."""
        wide = widened(self.shards.read(name, first, last))
        if name in self.factors:
            self.factors[name].add_to(wide, first)
        return wide

    def gathered(self, name: str, numbers: Int[np.ndarray, " rows"]) -> Float[np.ndarray, "rows columns"]:
        """The rows of these numbers, in their order; rows of number -1 are zeros."""
        found = np.zeros((len(numbers), self.shards.slots[name].columns), np.float32)
        start = 0
        for run in _runs(numbers.tolist()):
            if run[0] >= 0:
                found[start : start + len(run)] = self.rows(name, run[0], run[-1] + 1)
            start += len(run)
        return found


def require_alike(parents: Sequence[Parent]) -> tuple[str, ...]:
    """What a user should know of configs that differ. Raises RecipeError where models compute unlike things.

    Weights of one shape may belong to other counts of heads, or to another activation: their mean is no model.
    """
    first = parents[0]
    notices = []
    for parent in parents[1:]:
        for key in _SAME:
            one, other = first.text_config.get(key), parent.text_config.get(key)
            if key in first.text_config and key in parent.text_config and one != other:
                raise RecipeError(f"{key} is {one!r:.60} in {first.name} and {other!r:.60} in {parent.name}",
                                  allowed="models of one architecture",
                                  do="merge models of the same architecture and size")  # fmt: skip
        one_told, other_told = _told(first.text_config), _told(parent.text_config)
        if not (one_told["rope_parameters"] and other_told["rope_parameters"]):
            # Said in the words of transformers 5 and of 4: the old keys are made of the new ones, and say the same.
            one_told["rope_parameters"] = other_told["rope_parameters"] = None
        unlike = [key for key in _TOLD if one_told[key] != other_told[key]]
        if unlike:
            notices.append(f"config: {', '.join(unlike)} of {parent.name} and {first.name} differ; the latter's hold")
    return tuple(notices)


def _told(config: Mapping[str, Any]) -> dict[str, Any]:
    """What may differ, in the words of either line of transformers."""
    found = with_old_keys(config)
    scaling = found.get("rope_scaling")
    if isinstance(scaling, Mapping) and "type" in scaling:
        found["rope_scaling"] = {"rope_type": scaling["type"], **scaling}
        del found["rope_scaling"]["type"]
    return {key: found.get(key) for key in _TOLD}


def _runs(numbers: Sequence[int]) -> list[list[int]]:
    """Consecutive numbers together, and so for a row of -1."""
    found: list[list[int]] = []
    for number in numbers:
        if found and (number == found[-1][-1] + 1 if number >= 0 and found[-1][-1] >= 0 else number == found[-1][-1]):
            found[-1].append(number)
        else:
            found.append([number])
    return found
