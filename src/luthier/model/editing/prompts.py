"""Learned prompts as edits: embeddings that are trained themselves, or made by a small network that is.

Whatever made them, what a file holds is the embeddings: a network that encodes a prompt is of use in training only, and
folded away when the prompt is saved, as in PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from luthier.model.editing.edits import LearnedPrompt

FILE_KEY = "prompt_embeddings"


@final
class Prompt(LearnedPrompt):
    """Embeddings that are trained themselves, in float32."""

    def __init__(self, start: Float[Tensor, "P d"]) -> None:
        super().__init__()
        self.prompt = nn.Parameter(start.detach().float().clone())

    @property
    def token_count(self) -> int:
        return len(self.prompt)

    def embeddings(self, dtype: torch.dtype) -> Float[Tensor, "P d"]:
        return self.prompt.to(dtype)

    def tensors(self) -> Mapping[str, Tensor]:
        return {FILE_KEY: self.prompt}


@final
class EncodedPrompt(LearnedPrompt):
    """Embeddings that a network makes of trained ones; both are trained, in float32."""

    def __init__(self, start: Float[Tensor, "P e"], encoder: nn.Module) -> None:
        super().__init__()
        self.prompt = nn.Parameter(start.detach().float().clone())
        self.encoder = encoder

    @property
    def token_count(self) -> int:
        return len(self.prompt)

    def embeddings(self, dtype: torch.dtype) -> Float[Tensor, "P d"]:
        encoded: Tensor = self.encoder(self.prompt)
        return encoded.to(dtype)

    def tensors(self) -> Mapping[str, Tensor]:
        with torch.no_grad():
            return {FILE_KEY: self.embeddings(torch.float32)}
