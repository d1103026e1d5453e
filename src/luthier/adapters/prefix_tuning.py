"""Prefix tuning: learned keys and values that every token sees.

Idea: a prefix of learned keys and values is put before the text in every layer; the model itself stays frozen. In the
forest it is a root whose content is learned.
Equation: h_i = Attention(q_i, [P_K; K_{<=i}], [P_V; V_{<=i}]) with P_K, P_V in R^{P x kv} a layer; with a projection
    [P_K, P_V of all layers] = W_2 tanh(W_1 P' + b_1) + b_2.
Source: Li and Liang, arXiv 2101.00190, section 4, the projection 4.3; keys are taken after rotary embedding and the
    text's positions start at P, as in PEFT. The direct form is that of P-tuning v2, arXiv 2110.07602, section 3.2.
Cost: 2 L P kv trained parameters (kv = key-value heads x head size); attention over P more positions. With a projection
    of width m, P kv + m (kv + 1) + 2 L kv (m + 1) in training, and the direct form's in the file.
Use when: many tasks share one served base, or low data and a frozen model are required.
Not when: short training with a small learning rate: the direct form needs rates of 1e-2 and warm-up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self, final

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from luthier.adapters import Adapter
from luthier.core.errors import RecipeError
from luthier.model.editing.edits import Edit, LearnedKeysValues
from luthier.model.editing.sites import Sites

OF_A_DECODER = "DECODER_PREFIX_TUNING"
"""What a file for an encoder-decoder is called. PEFT gives the decoder's layer i the prefix of layer 2i, counted round,
so the same file would be another model there; it refuses what goes by this name."""


@final
class PrefixTuning(Adapter):
    """A learned prefix of keys and values in every layer."""

    peft_type: ClassVar[str | None] = "PREFIX_TUNING"
    provides: ClassVar[frozenset[str]] = frozenset({"learned-root"})

    prefix_tokens: int = Field(20, ge=1, description="positions of the learned prefix")
    init_std: float = Field(0.02, gt=0, description="standard deviation of the initial keys and values")
    projection: bool = Field(False, description="write the prefix by a network, which is folded away when it is saved")
    projection_size: int = Field(512, ge=1, description="width of that network")

    def attach(self, sites: Sites) -> list[Edit]:
        if sites.key_value_heads == 0:
            raise RecipeError("the model has no attention, so no keys and values to learn", do="use lora")
        return [ProjectedPrefix(self, sites) if self.projection else Prefix(self, sites)]

    def parameter_count(self, sites: Sites) -> int:
        width, m = sites.key_value_heads * sites.head_size, self.projection_size
        if self.projection:
            return self.prefix_tokens * width + m * (width + 1) + 2 * sites.root_layers * width * (m + 1)
        return 2 * sites.root_layers * self.prefix_tokens * width

    def peft_config(self, sites: Sites) -> dict[str, Any]:
        return {
            "num_virtual_tokens": self.prefix_tokens,
            "num_layers": sites.root_layers,
            "num_attention_heads": sites.key_value_heads,
            "token_dim": sites.key_value_heads * sites.head_size,
            "num_transformer_submodules": 1,
            "encoder_hidden_size": sites.key_value_heads * sites.head_size,
            "prefix_projection": False,
            **({"peft_type": OF_A_DECODER} if sites.two_stacks else {}),
        }

    @classmethod
    def describes(cls, config: Mapping[str, Any]) -> bool:
        return config.get("peft_type") in (cls.peft_type, OF_A_DECODER)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        if int(config.get("num_transformer_submodules") or 1) != 1:
            raise RecipeError(
                "the prefix is PEFT's for an encoder-decoder, whose layers share the keys of others",
                allowed="prefixes of PEFT for a decoder or an encoder, and luthier's own for an encoder-decoder",
            )
        # PEFT folds the projection away when it saves, so the file holds the final prefix either way.
        return cls(prefix_tokens=int(config["num_virtual_tokens"]))


@final
class Prefix(LearnedKeysValues):
    """Keys and values of all layers, laid out as in PEFT's file: (P, L x 2 x heads x size), keys first."""

    def __init__(self, method: PrefixTuning, sites: Sites) -> None:
        super().__init__()
        self.shape = _shape(method, sites)
        start = torch.randn(method.prefix_tokens, math.prod(self.shape[1:])) * method.init_std
        self.prefix = nn.Parameter(start.to(sites.all[0].device))

    @property
    def token_count(self) -> int:
        return self.shape[0]

    def keys_values(self, dtype: torch.dtype) -> Float[Tensor, "layers 2 heads root size"]:
        return self.prefix.view(self.shape).permute(1, 2, 3, 0, 4).to(dtype)

    def tensors(self) -> Mapping[str, Tensor]:
        return {"prompt_embeddings": self.prefix}


@final
class ProjectedPrefix(LearnedKeysValues):
    """A prefix that a network makes of one trained row for each position; a file holds what it has made."""

    def __init__(self, method: PrefixTuning, sites: Sites) -> None:
        super().__init__()
        self.shape = _shape(method, sites)
        width, device = sites.key_value_heads * sites.head_size, sites.all[0].device
        self.rows = nn.Parameter(torch.randn(method.prefix_tokens, width).to(device))
        size = method.projection_size
        self.network = nn.Sequential(nn.Linear(width, size), nn.Tanh(), nn.Linear(size, math.prod(self.shape[1:])))
        self.network.to(device)

    @property
    def token_count(self) -> int:
        return self.shape[0]

    def keys_values(self, dtype: torch.dtype) -> Float[Tensor, "layers 2 heads root size"]:
        made: Tensor = self.network(self.rows)
        return made.view(self.shape).permute(1, 2, 3, 0, 4).to(dtype)

    def tensors(self) -> Mapping[str, Tensor]:
        with torch.no_grad():
            return {"prompt_embeddings": self.network(self.rows)}


def _shape(method: PrefixTuning, sites: Sites) -> tuple[int, int, int, int, int]:
    return method.prefix_tokens, sites.root_layers, 2, sites.key_value_heads, sites.head_size
