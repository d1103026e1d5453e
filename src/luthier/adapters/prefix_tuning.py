"""Prefix tuning: learned keys and values that every token sees.

Idea: a prefix of learned keys and values is put before the text in every layer; the model itself stays frozen. In the
forest it is a root whose content is learned.
Equation: h_i = Attention(q_i, [P_K; K_{<=i}], [P_V; V_{<=i}]) with P_K, P_V in R^{P x kv} a layer.
Source: Li and Liang, arXiv 2101.00190, section 4; keys are taken after rotary embedding and the text's positions start
    at P, as in PEFT. This is the direct form; the paper's reparametrising MLP is not used.
Cost: 2 L P kv trained parameters (kv = key-value heads x head size); attention over P more positions.
Use when: many tasks share one served base, or low data and a frozen model are required.
Not when: short training with a small learning rate; the direct form needs rates of 1e-2 and warm-up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self, final

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from luthier.adapters import Adapter
from luthier.core.errors import RecipeError
from luthier.model.edits import Edit, LearnedRoot
from luthier.model.sites import Sites


@final
class PrefixTuning(Adapter):
    """A learned prefix of keys and values in every layer."""

    peft_type: ClassVar[str | None] = "PREFIX_TUNING"
    provides: ClassVar[frozenset[str]] = frozenset({"learned-root"})

    prefix_tokens: int = Field(20, ge=1, description="positions of the learned prefix")
    init_std: float = Field(0.02, gt=0, description="standard deviation of the initial keys and values")

    def attach(self, sites: Sites) -> list[Edit]:
        if sites.key_value_heads == 0:
            raise RecipeError("the model has no attention, so no keys and values to learn", do="use lora")
        return [Prefix(self, sites)]

    def parameter_count(self, sites: Sites) -> int:
        return 2 * sites.layers * self.prefix_tokens * sites.key_value_heads * sites.head_size

    def peft_config(self, sites: Sites) -> dict[str, Any]:
        return {
            "num_virtual_tokens": self.prefix_tokens,
            "num_layers": sites.layers,
            "num_attention_heads": sites.key_value_heads,
            "token_dim": sites.key_value_heads * sites.head_size,
            "num_transformer_submodules": 1,
            "encoder_hidden_size": sites.key_value_heads * sites.head_size,
            "prefix_projection": False,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        if int(config.get("num_transformer_submodules") or 1) != 1:
            raise RecipeError("the prefix is for an encoder and a decoder", allowed="decoder-only models")
        # PEFT folds the projection away when it saves, so the file holds the final prefix either way.
        return cls(prefix_tokens=int(config["num_virtual_tokens"]))


@final
class Prefix(LearnedRoot):
    """Keys and values of all layers, laid out as in PEFT's file: (P, L x 2 x heads x size), keys first."""

    def __init__(self, method: PrefixTuning, sites: Sites) -> None:
        super().__init__()
        self.shape = (method.prefix_tokens, sites.layers, 2, sites.key_value_heads, sites.head_size)
        width = sites.layers * 2 * sites.key_value_heads * sites.head_size
        start = torch.randn(method.prefix_tokens, width) * method.init_std
        self.prefix = nn.Parameter(start.to(sites.all[0].device))

    @property
    def token_count(self) -> int:
        return self.shape[0]

    def keys_values(
        self, layer: int, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "1 heads root size"], Float[Tensor, "1 heads root size"]]:
        pair = self.prefix.view(self.shape)[:, layer].to(dtype)
        return pair[:, 0].transpose(0, 1)[None], pair[:, 1].transpose(0, 1)[None]

    def tensors(self) -> Mapping[str, Tensor]:
        return {"prompt_embeddings": self.prefix}
