"""Prompt tuning: learned embeddings before the text, and nothing else.

Idea: a few vectors stand where the embeddings of words would and are trained; the model is frozen. It is a prompt that
need not be made of words. In the forest it is a root whose content is learned.
Equation: h = LM([P_e; E(x)]), P_e in R^{P x d}.
Source: Lester et al., arXiv 2104.08691, section 2; starts: sampled from the vocabulary, the embeddings of a text, or
    those of class labels (the mean of each label's tokens, the rest sampled), section 3.2.
Cost: P d trained parameters; P more tokens through the model for each micro-batch, and P more keys for each token.
Use when: very many tasks share one served base: a task is a few kilobytes.
Not when: the model is small (below about a billion parameters it stays behind every other method), or rates are those
    of other methods: it needs 0.1 to 0.5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, final

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from luthier.adapters import Adapter
from luthier.core.errors import RecipeError
from luthier.model.editing.edits import Edit
from luthier.model.editing.prompts import Prompt
from luthier.model.editing.sites import Site, Sites

COMMON = 5000
"""Tokenizers list common tokens first; the paper samples from so many of them."""


@final
class PromptTuning(Adapter):
    """Learned embeddings before every text."""

    peft_type: ClassVar[str | None] = "PROMPT_TUNING"
    provides: ClassVar[frozenset[str]] = frozenset({"learned-root"})

    prompt_tokens: int = Field(20, ge=1, description="positions of the learned prompt")
    init: Literal["vocabulary", "text", "labels", "random"] = Field(
        "vocabulary", description="what the prompt starts as: sampled tokens, a text, one mean for each label, or noise"
    )
    init_texts: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        (), description="the text, or the labels, that it starts as; a text is repeated or cut to fit"
    )
    init_ids: Annotated[tuple[tuple[int, ...], ...], Field(strict=False)] = Field(
        (), description="their tokens, when they are given as ids; found from init_texts where a tokenizer is at hand"
    )
    init_std: float = Field(0.5, gt=0, description="half the width of the noise, which is uniform, for init random")

    def attach(self, sites: Sites) -> list[Edit]:
        (embed, *_) = sites.role("embed")
        size = embed.in_features
        if self.init == "random":
            noise = torch.rand(self.prompt_tokens, sites.hidden) * 2 - 1
            return [Prompt(noise.to(embed.device) * self.init_std)]
        given = self._start_ids(size)
        missing = self.prompt_tokens - len(given)
        sampled = torch.randperm(min(size, max(COMMON, missing)))[:missing].tolist()
        if len(sampled) < missing:
            raise RecipeError(f"the model has {size} tokens", do=f"set prompt_tokens to at most {size}")
        rows = [_embedded(embed, ids).mean(0) for ids in (*given, *((token,) for token in sampled))]
        return [Prompt(torch.stack(rows))]

    def parameter_count(self, sites: Sites) -> int:
        return self.prompt_tokens * sites.hidden

    def with_token_ids(
        self, token_id: Callable[[str], int], stop_ids: tuple[int, ...], encode: Callable[[str], Sequence[int]]
    ) -> Self:
        if not self.init_texts or self.init_ids:
            return self
        found = [tuple(int(token) for token in encode(text)) for text in self.init_texts]
        if empty := [text for text, ids in zip(self.init_texts, found, strict=True) if not ids]:
            raise RecipeError(f"adapter.init_texts: {empty[0]!r} has no token", allowed="texts that are not empty")
        if self.init == "text":
            found = [(token,) for ids in found for token in ids]
        return self.model_copy(update={"init_ids": tuple(found)})

    def peft_config(self, sites: Sites) -> dict[str, Any]:
        return {
            "num_virtual_tokens": self.prompt_tokens,
            "token_dim": sites.hidden,
            "num_layers": sites.layers,
            "num_attention_heads": sites.heads,
            "num_transformer_submodules": 1,
            "prompt_tuning_init": "RANDOM",
            "prompt_tuning_init_text": None,
            "tokenizer_name_or_path": None,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        if int(config.get("num_transformer_submodules") or 1) != 1:
            raise RecipeError("the prompt is for an encoder and a decoder", allowed="decoder-only models")
        # Its values come from the file, whatever they once started as.
        return cls(prompt_tokens=int(config["num_virtual_tokens"]), init="random")

    def _start_ids(self, vocabulary: int) -> list[tuple[int, ...]]:
        """The tokens of each position that starts as something, without those that are sampled."""
        if self.init == "vocabulary":
            return []
        if not self.init_ids:
            raise RecipeError(
                f"adapter.init is {self.init!r}, and nothing says which",
                allowed="init_texts, with a tokenizer at hand, or init_ids",
                do="""name it: --set 'adapter.init_texts=["Classify the sentence:"]'""",
            )
        if unknown := [token for ids in self.init_ids for token in ids if not 0 <= token < vocabulary]:
            raise RecipeError(f"adapter.init_ids: token {unknown[0]} has no row", allowed=f"0 to {vocabulary - 1}")
        ids = list(self.init_ids)
        if self.init == "text":
            ids *= -(-self.prompt_tokens // len(ids))
        return ids[: self.prompt_tokens]


@torch.no_grad()
def _embedded(embed: Site, ids: tuple[int, ...]) -> Float[Tensor, "n d"]:
    """Tokens as the model sees them: some embedding modules scale their rows."""
    found: Tensor = embed.module(torch.tensor(ids, device=embed.device))
    return found.float()
