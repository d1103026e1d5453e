"""LoRA factors from files: what an adapter adds to each module, as two thin matrices.

Idea: an adapter in PEFT's format is a pair of factors for each module and a scale. Read here, the scale is in the
second factor, and what would make the sum of base and product wrong (dora, trained heads, biases) is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
from jaxtyping import Float

from luthier.core.errors import CorruptError, RecipeError
from luthier.data.strict_json import excerpt
from luthier.kernels.floats import widened
from luthier.model.files.array_files import load_arrays
from luthier.model.files.json_files import read_object
from luthier.model.files.shards import Slot

CONFIG: Final = "adapter_config.json"
TENSORS: Final = "adapter_model.safetensors"
PREFIX: Final = "base_model.model."
_SAVE: Final = "fetch or save the adapter again"
_PLAIN: Final = ("use_dora", "modules_to_save", "lora_bias", "trainable_token_indices")
"""What an adapter's config must not have, to be a product of two factors for each tensor."""


@final
@dataclass(frozen=True)
class Factors:
    """What LoRA adds to a tensor: `up @ down`, the scale in `up`; as (in, out) where the file keeps it so."""

    down: Float[np.ndarray, "r in"]
    up: Float[np.ndarray, "out r"]
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        shape = (len(self.up), self.down.shape[1])
        return shape[::-1] if self.transposed else shape

    def add_to(self, rows: Float[np.ndarray, "rows columns"], first: int) -> None:
        """Add these rows of the product."""
        own = slice(first, first + len(rows))
        rows += self.down[:, own].T @ self.up.T if self.transposed else self.up[own] @ self.down


def config_of(folder: Path) -> dict[str, Any]:
    """The config of a plain LoRA adapter. Raises RecipeError for another kind of adapter."""
    if not (folder / CONFIG).is_file():
        raise RecipeError(f"{folder} holds no {CONFIG}", do="name a folder in PEFT's format")
    config = read_object(folder / CONFIG)
    odd = [key for key in _PLAIN if config.get(key)]
    if config.get("peft_type") != "LORA" or odd:
        what = f"uses {odd[0]}" if odd else f"is of type {config.get('peft_type')!r:.40}"
        raise RecipeError(
            f"the adapter in {folder} {what}",
            allowed="plain LoRA",
            do="write the tuned model as a folder of whole weights first, and merge that",
        )
    return config


def pairs_of(folder: Path) -> dict[str, Factors]:
    """The factors of each module of a plain LoRA adapter, in float32.

    Raises RecipeError for another kind of adapter, and CorruptError for tensors that are no pairs.
    """
    config = config_of(folder)
    tensors = load_arrays(folder / TENSORS)
    stems = {name.partition(".lora_A")[0] for name in tensors if ".lora_A." in name}
    known = {f"{stem}.lora_{part}.weight" for stem in stems for part in "AB"}
    if strange := sorted(set(tensors) ^ known):
        raise CorruptError(f"{excerpt(strange[0])} has no partner or no place", allowed="lora_A and lora_B in pairs",
                           do=_SAVE, where=str(folder / TENSORS))  # fmt: skip
    found = {}
    for stem in sorted(stems):
        module = stem.removeprefix(PREFIX)
        down, up = (widened(tensors[f"{stem}.lora_{part}.weight"]) for part in "AB")
        if down.ndim != 2 or up.ndim != 2 or len(down) != up.shape[1]:
            raise CorruptError(f"the factors of {excerpt(module)} are {list(down.shape)} and {list(up.shape)}",
                               allowed="(r, in) and (out, r)", do=_SAVE, where=str(folder / TENSORS))  # fmt: skip
        found[module] = Factors(down, up * scale_of(config, module), bool(config.get("fan_in_fan_out")))
    return found


def factors_of(folder: Path, slots: Mapping[str, Slot]) -> dict[str, Factors]:
    """What the adapter in `folder` adds to each tensor of `slots`. Raises CorruptError where it does not fit them."""
    return placed(pairs_of(folder), slots, str(folder))


def placed(pairs: Mapping[str, Factors], slots: Mapping[str, Slot], where: str) -> dict[str, Factors]:
    """The factors of modules by the tensors they change. Raises CorruptError where there are none of that shape."""
    found = {}
    for module, factors in pairs.items():
        name = next((each for each in _names(module) if each in slots), None)
        if name is None:
            raise CorruptError(f"the model has no tensor for {excerpt(module)}", where=where,
                               do="name the model that the adapter was trained on")  # fmt: skip
        if factors.shape != slots[name].shape:
            raise CorruptError(f"the factors of {excerpt(module)} make {factors.shape}", allowed=str(slots[name].shape),
                               where=where, do="name the model that the adapter was trained on")  # fmt: skip
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
                           do=_SAVE)  # fmt: skip
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _names(module: str) -> tuple[str, ...]:
    """What a file may call the weight of a module: with or without the name of the body around it."""
    inner = module.partition(".")[2]
    return f"{module}.weight", f"{inner}.weight", f"model.{module}.weight"
