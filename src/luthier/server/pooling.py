"""Pooling: how the states of a text become its vector, as the files of sentence-transformers beside a model say."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from luthier.core.errors import RecipeError
from luthier.data.hub import ModelFiles

Way = Literal["mean", "cls", "max"]
_WAYS: Final[Mapping[str, Way]] = {"mean_tokens": "mean", "cls_token": "cls", "max_tokens": "max"}


@final
@dataclass(frozen=True)
class Pooling:
    """How the states of a text become a vector; texts are cut at `longest` tokens where the folder says so."""

    kind: Way = "mean"
    unit: bool = True
    longest: int | None = None

    @classmethod
    def of(cls, files: ModelFiles) -> Pooling:
        """What the files of a model say. Raises RecipeError for a way that is not known here."""
        listed = files.find("modules.json")
        if listed is None:
            return cls()
        modules = json.loads(listed.read_text("utf-8"))
        kinds = {str(each.get("type", "")).rpartition(".")[2]: str(each.get("path", "")) for each in modules}
        place = kinds.get("Pooling", "1_Pooling")
        if set(kinds) - {"Transformer", "Pooling", "Normalize"} or not re.fullmatch(r"[\w-]+", place):
            raise RecipeError(f"{listed} names {', '.join(kinds)}", allowed="Transformer, Pooling and Normalize")
        said = files.json(f"{place}/config.json")
        on = [key for key, value in said.items() if key.startswith("pooling_mode_") and value is True]
        way = _WAYS.get(on[0].removeprefix("pooling_mode_")) if len(on) == 1 else None
        if way is None:
            told = f"{listed.parent} pools by {', '.join(on) or 'nothing'}"
            raise RecipeError(told, allowed="one of " + ", ".join(_WAYS))
        longest = files.json("sentence_bert_config.json").get("max_seq_length")
        return cls(way, "Normalize" in kinds, longest if isinstance(longest, int) else None)

    def __call__(self, states: Float[Tensor, "B T d"], mask: Int[Tensor, "B T"]) -> Float[Tensor, "B d"]:
        """The vectors of some texts."""
        there = mask[..., None].to(states.dtype)
        if self.kind == "cls":
            pooled = states[:, 0]
        elif self.kind == "max":
            pooled = states.masked_fill(there == 0, float("-inf")).amax(1)
        else:
            pooled = (states * there).sum(1) / there.sum(1)
        return torch.nn.functional.normalize(pooled, dim=-1) if self.unit else pooled
