"""Which models GGUF has a place for, what their tensors are called there, and how the numbers lie.

Idea: llama.cpp computes a family with its own code, so a tensor has the name and the order that this code expects. The
names come from the gguf package's table. What differs in the numbers is small and known: the rows of q and k of the
llama family, whose code turns neighbouring pairs where transformers turns halves, and the norms of the gemma family,
which are stored with the 1 that transformers adds when it computes. Each change has its inverse, written on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor

from luthier.core import optional
from luthier.core.errors import RecipeError

PURPOSE: Final = "exporting GGUF"
EXTRA: Final = "gguf"
_SUFFIXES: Final = (".weight", ".bias")
_EMBEDDING: Final = "token_embd.weight"
OUTPUT: Final = "output.weight"
_HEAD: Final = "lm_head.weight"
ROPE_FACTORS: Final = "rope_freqs.weight"
"""Divisors of the rotation's frequencies: computed from the config, no weight of the model."""


@final
@dataclass(frozen=True, slots=True)
class Family:
    """A family as GGUF calls it; `turned`: q and k have the order of pairs; `plus_one`: norms are stored with the 1."""

    architecture: str
    turned: bool = False
    plus_one: bool = False


FAMILIES: Final[Mapping[str, Family]] = {
    "llama": Family("llama", turned=True),
    "mistral": Family("llama", turned=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma": Family("gemma", plus_one=True),
    "gemma2": Family("gemma2", plus_one=True),
    "gemma3_text": Family("gemma3", plus_one=True),
    "phi": Family("phi2"),
    "phi3": Family("phi3"),
}
"""By transformers' `model_type`."""


@final
@dataclass(frozen=True)
class Layout:
    """Names and order of one model's tensors, both ways."""

    family: Family
    heads: int
    groups: int
    tied: bool
    named: Callable[[str], str | None]

    @classmethod
    def of(cls, config: Any) -> Layout:
        """The layout for a config. Raises RecipeError for a family that has none, MissingError without the package."""
        family = family_of(config)
        gguf = optional.require("gguf", extra=EXTRA, purpose=PURPOSE)
        codes = {name: code for code, name in gguf.MODEL_ARCH_NAMES.items()}
        table = gguf.get_tensor_name_map(codes[family.architecture], int(config.num_hidden_layers))
        heads = int(config.num_attention_heads)
        return cls(
            family=family,
            heads=heads,
            groups=int(getattr(config, "num_key_value_heads", None) or heads),
            tied=bool(config.tie_word_embeddings),
            named=lambda name: table.get_name(name, try_suffixes=_SUFFIXES),
        )

    def name(self, name: str) -> str | None:
        """The name in the file of what transformers calls `name`; None for a head that is its embedding.

        Raises RecipeError for a tensor that the family has no place for.
        """
        if self.tied and name == _HEAD:
            return None
        found = self.named(name)
        if found is None:
            raise RecipeError(
                f"{name} has no place in GGUF's {self.family.architecture} models",
                allowed="the tensors of the plain model",
                do="merge what was added to the model, or export it with --to merged",
            )
        return found

    def stored(self, name: str, tensor: Tensor) -> Tensor:
        """The numbers as the file has them; `name` is the file's."""
        if self.family.turned and _is_turned(name):
            return turn(tensor, self.heads if "attn_q." in name else self.groups)
        if self.family.plus_one and _is_norm(name):
            return tensor.float() + 1
        return tensor

    def restored(self, name: str, tensor: Tensor) -> Tensor:
        """The numbers as transformers has them, from what stands in a file."""
        if self.family.turned and _is_turned(name):
            return turn_back(tensor, self.heads if "attn_q." in name else self.groups)
        if self.family.plus_one and _is_norm(name):
            return tensor.float() - 1
        return tensor


def family_of(config: Any) -> Family:
    """The family of a config. Raises RecipeError for one that GGUF, or this mapping, does not know."""
    kind = str(getattr(config, "model_type", ""))
    found = FAMILIES.get(kind)
    if found is None:
        raise RecipeError(
            f"the model is of the kind {kind!r}, which the export to GGUF does not know",
            allowed=", ".join(FAMILIES),
            do="export it with --to merged; llama.cpp's own converter may know it",
        )
    return found


def turn(tensor: Tensor, heads: int) -> Tensor:
    """Rows of q or k from transformers' halves to pairs: (heads, 2, half, ...) becomes (heads, half, 2, ...)."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def turn_back(tensor: Tensor, heads: int) -> Tensor:
    """Rows of q or k from pairs to halves: the even ones of each head first, then the odd ones."""
    rows = torch.arange(tensor.shape[0]).reshape(heads, -1)
    return tensor[torch.cat([rows[:, 0::2], rows[:, 1::2]], 1).reshape(-1)]


def is_matrix_to_pack(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is one of the large ones; norms, biases and factors stay as they are."""
    return len(shape) == 2 and name.endswith(".weight") and not _is_norm(name)


def is_outer(name: str, *, tied: bool) -> bool:
    """Whether a tensor is the head, or the embedding that is one."""
    return name == OUTPUT or (tied and name == _EMBEDDING)


def _is_turned(name: str) -> bool:
    return ".attn_q." in name or ".attn_k." in name


def _is_norm(name: str) -> bool:
    return name.endswith("norm.weight")
