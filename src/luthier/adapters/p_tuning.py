"""P-tuning: a learned prompt that a small network writes.

Idea: neighbouring vectors of a prompt belong together, and free ones find that out slowly. So they are made from
trained vectors by an LSTM that reads them in both directions, or by an MLP; what is saved is what it wrote.
Equation: h = LM([f(P'); E(x)]); f = MLP(BiLSTM(P')), or an MLP of three layers.
Source: Liu et al., arXiv 2103.10385, section 3.2, and PEFT's PromptEncoder for sizes: two LSTM layers, ReLU between.
Cost: P d + the network's parameters in training (an MLP of width m: d m + m^2 + m d and biases); P d in the file.
Use when: prompt tuning is wanted and trains unsteadily.
Not when: there is room for prefix tuning or LoRA, which are better on all but the largest models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, final

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from luthier.adapters import Adapter
from luthier.core.errors import RecipeError
from luthier.model.editing.edits import Edit
from luthier.model.editing.prompts import EncodedPrompt, Prompt
from luthier.model.editing.sites import Sites


@final
class PTuning(Adapter):
    """A learned prompt behind an encoder."""

    peft_type: ClassVar[str | None] = "P_TUNING"
    provides: ClassVar[frozenset[str]] = frozenset({"learned-root", "folds-when-saved"})

    prompt_tokens: int = Field(20, ge=1, description="positions of the learned prompt")
    encoder: Literal["mlp", "lstm", "none"] = Field(
        "mlp", description="what writes the prompt; none is a prompt that was read from a file"
    )
    encoder_size: int = Field(128, ge=1, description="width of the encoder")
    lstm_layers: int = Field(2, ge=1, description="layers of the LSTM")
    lstm_dropout: float = Field(0.0, ge=0, lt=1, description="dropout between layers of the LSTM in training")

    def attach(self, sites: Sites) -> list[Edit]:
        device = sites.all[0].device
        start = torch.randn(self.prompt_tokens, sites.hidden)
        if self.encoder == "none":
            return [Prompt(start.to(device))]
        return [EncodedPrompt(start.to(device), self._encoder(sites.hidden).to(device))]

    def parameter_count(self, sites: Sites) -> int:
        d, m, count = sites.hidden, self.encoder_size, self.prompt_tokens * sites.hidden
        if self.encoder == "none":
            return count
        if self.encoder == "mlp":
            return count + (d * m + m) + (m * m + m) + (m * d + d)
        read = [d, *[2 * m] * (self.lstm_layers - 1)]
        return count + sum(2 * 4 * m * (width + m + 2) for width in read) + (4 * m * m + 2 * m) + (2 * m * d + d)

    def peft_config(self, sites: Sites) -> dict[str, Any]:
        return {
            "num_virtual_tokens": self.prompt_tokens,
            "token_dim": sites.hidden,
            "num_layers": sites.layers,
            "num_attention_heads": sites.heads,
            "num_transformer_submodules": 1,
            "encoder_reparameterization_type": "LSTM" if self.encoder == "lstm" else "MLP",
            "encoder_hidden_size": self.encoder_size,
            "encoder_num_layers": self.lstm_layers,
            "encoder_dropout": self.lstm_dropout,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        if int(config.get("num_transformer_submodules") or 1) != 1:
            raise RecipeError("the prompt is for an encoder and a decoder", allowed="decoder-only models")
        return cls(prompt_tokens=int(config["num_virtual_tokens"]), encoder="none")

    def _encoder(self, hidden: int) -> nn.Module:
        size = self.encoder_size
        if self.encoder == "mlp":
            return nn.Sequential(
                nn.Linear(hidden, size), nn.ReLU(), nn.Linear(size, size), nn.ReLU(), nn.Linear(size, hidden)
            )
        return ReadBothWays(hidden, size, layers=self.lstm_layers, dropout=self.lstm_dropout)


@final
class ReadBothWays(nn.Module):
    """A bidirectional LSTM with an MLP on what both directions have seen."""

    def __init__(self, hidden: int, size: int, *, layers: int, dropout: float) -> None:
        super().__init__()
        # torch warns of dropout with one layer, where it has no place.
        between = dropout if layers > 1 else 0.0
        self.lstm = nn.LSTM(hidden, size, layers, dropout=between, bidirectional=True)
        self.mlp = nn.Sequential(nn.Linear(2 * size, 2 * size), nn.ReLU(), nn.Linear(2 * size, hidden))

    def forward(self, prompt: Float[Tensor, "P d"]) -> Float[Tensor, "P d"]:
        written: Tensor = self.mlp(self.lstm(prompt)[0])
        return written
