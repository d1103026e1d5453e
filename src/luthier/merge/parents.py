"""The models that are merged: their tensors as a stream, with an adapter's changes added on the way.

Idea: a parent is a folder of shards, its config, and perhaps LoRA factors. Rows are asked for in float32; where factors
belong to a tensor their product is added to the rows as they come, so that a tuned adapter is merged without a folder
of its weights. Rows that a parent's vocabulary does not have are filled from those that have them (`vocabulary.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from luthier.core.errors import CorruptError, RecipeError
from luthier.data.hub import ModelFiles
from luthier.data.reading.strict_json import excerpt
from luthier.model.json_files import read_object
from luthier.model.shards import Shards, Slot
from luthier.model.tensor_files import load_tensors

ADAPTER_CONFIG: Final = "adapter_config.json"
ADAPTER_TENSORS: Final = "adapter_model.safetensors"
_PREFIX: Final = "base_model.model."
_PLAIN: Final = ("use_dora", "modules_to_save", "lora_bias", "trainable_token_indices")
"""What an adapter's config must not have, to be a product of two factors for each tensor."""


@final
@dataclass(frozen=True)
class Factors:
    """What LoRA adds to a tensor: `up @ down`, the scale in `up`; as (in, out) where the file keeps it so."""

    down: Float[Tensor, "r in"]
    up: Float[Tensor, "out r"]
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        shape = (len(self.up), self.down.shape[1])
        return shape[::-1] if self.transposed else shape

    def add_to(self, rows: Float[Tensor, "rows columns"], first: int) -> None:
        """Add these rows of the product."""
        own = slice(first, first + len(rows))
        if self.transposed:
            rows.addmm_(self.down[:, own].t(), self.up.t())
        else:
            rows.addmm_(self.up[own], self.down)


@final
@dataclass
class Parent:
    """A model that is merged. `name` is what the user called it."""

    name: str
    shards: Shards
    config: dict[str, Any]
    files: ModelFiles
    factors: Mapping[str, Factors] = field(default_factory=dict)

    @classmethod
    def open(cls, name: str, source: str, adapter: Path | None = None) -> Parent:
        """Open the files of a model, without reading a tensor. Raises RecipeError for one whose weights are packed."""
        files = ModelFiles.of(source)
        config = files.json("config.json")
        if not config:
            raise RecipeError(f"{name} has no config.json", do="name a folder in the Hugging Face layout, or a hub id")
        if config.get("quantization_config"):
            raise RecipeError(
                f"{name} holds packed weights (its config.json has quantization_config)",
                allowed="weights in float32, bfloat16 or float16",
                do="merge the version that is not quantized, and quantize the result",
            )
        shards = Shards(source)
        try:
            factors = {} if adapter is None else read_factors(adapter, shards.slots)
        except BaseException:
            shards.close()
            raise
        return cls(name, shards, config, files, factors)

    @property
    def text_config(self) -> dict[str, Any]:
        """The config of the language model, which may lie inside that of a larger one."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config

    @property
    def layers(self) -> int:
        """How many layers the config says there are; 0 where it does not."""
        for key in ("num_hidden_layers", "n_layer", "num_layers"):
            if isinstance(count := self.text_config.get(key), int):
                return count
        return 0

    def rows(self, name: str, first: int, last: int) -> Float[Tensor, "rows columns"]:
        """Rows of a tensor in float32, what an adapter changes included."""
        raw = self.shards.read(name, first, last)
        wide = raw.float()
        if name in self.factors:
            self.factors[name].add_to(wide, first)
        return wide

    def gathered(self, name: str, numbers: Int[Tensor, " rows"]) -> Float[Tensor, "rows columns"]:
        """The rows of these numbers, in their order; rows of number -1 are zeros."""
        found = torch.zeros(len(numbers), self.shards.slots[name].columns)
        start = 0
        for run in _runs(numbers.tolist()):
            if run[0] >= 0:
                found[start : start + len(run)] = self.rows(name, run[0], run[-1] + 1)
            start += len(run)
        return found


def read_factors(folder: Path, slots: Mapping[str, Slot]) -> dict[str, Factors]:
    """What the LoRA adapter in `folder` (PEFT's format) adds to each tensor of `slots`, in float32.

    Raises RecipeError for another kind of adapter, and CorruptError where factors have no tensor or do not fit it.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        raise RecipeError(f"{folder} holds no {ADAPTER_CONFIG}", do="name a folder in PEFT's format")
    config = read_object(folder / ADAPTER_CONFIG)
    odd = [key for key in _PLAIN if config.get(key)]
    if config.get("peft_type") != "LORA" or odd:
        what = f"uses {odd[0]}" if odd else f"is of type {config.get('peft_type')!r:.40}"
        raise RecipeError(
            f"the adapter in {folder} {what}",
            allowed="plain LoRA",
            do="write the tuned model as a folder of whole weights first, and merge that",
        )
    tensors = load_tensors(folder / ADAPTER_TENSORS)
    stems = {name.partition(".lora_A")[0] for name in tensors if ".lora_A." in name}
    known = {f"{stem}.lora_{part}.weight" for stem in stems for part in "AB"}
    if strange := sorted(set(tensors) ^ known):
        raise CorruptError(f"{excerpt(strange[0])} has no partner or no place", allowed="lora_A and lora_B in pairs",
                           where=str(folder / ADAPTER_TENSORS))  # fmt: skip
    found = {}
    for stem in sorted(stems):
        module = stem.removeprefix(_PREFIX)
        name = next((each for each in _names(module) if each in slots), None)
        if name is None:
            raise CorruptError(f"the model has no tensor for {excerpt(module)}", where=str(folder),
                               do="name the model that the adapter was trained on")  # fmt: skip
        down, up = (tensors[f"{stem}.lora_{part}.weight"].float() for part in "AB")
        factors = Factors(down, up * scale_of(config, module), bool(config.get("fan_in_fan_out")))
        if factors.shape != slots[name].shape:
            raise CorruptError(f"the factors of {excerpt(module)} make {factors.shape}", allowed=str(slots[name].shape),
                               where=str(folder), do="name the model that the adapter was trained on")  # fmt: skip
        found[name] = factors
    return found


def scale_of(config: Mapping[str, Any], module: str) -> float:
    """What the product of a module's factors is multiplied by."""
    rank, alpha = (
        next((value for ending, value in (config.get(patterns) or {}).items()
              if module == ending or module.endswith(f".{ending}")), config.get(key))
        for patterns, key in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    )  # fmt: skip
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise CorruptError(f"the adapter has r = {rank!r} and lora_alpha = {alpha!r}", allowed="numbers above 0",
                           do="save the adapter again")  # fmt: skip
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _names(module: str) -> tuple[str, ...]:
    """What a file may call the weight of a module: with or without the name of the body around it."""
    inner = module.partition(".")[2]
    return f"{module}.weight", f"{inner}.weight", f"model.{module}.weight"


def _runs(numbers: Sequence[int]) -> list[list[int]]:
    """Consecutive numbers together, and so for a row of -1."""
    found: list[list[int]] = []
    for number in numbers:
        if found and (number == found[-1][-1] + 1 if number >= 0 and found[-1][-1] >= 0 else number == found[-1][-1]):
            found[-1].append(number)
        else:
            found.append([number])
    return found
