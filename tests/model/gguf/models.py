"""Tiny models of every family that GGUF has a place for, and of those that are trained: few of them, quickly."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor

from luthier.data.tokenizer import Tokenizer
from luthier.model.gguf.model_file import Model
from tests.tiny import tiny_tokenizer

SHARED: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": 1,
    "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
KINDS = ("llama", "llama3", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi", "phi3")
LEARNT = ("llama", "qwen2", "gemma2", "phi3")


def config(kind: str) -> Any:
    """The config of a tiny model of one of `KINDS`."""
    six = {**SHARED, "num_hidden_layers": 6}
    return {
        "llama": lambda: transformers.LlamaConfig(**SHARED),
        "llama3": lambda: transformers.LlamaConfig(
            **SHARED, rope_parameters=LLAMA3, attention_bias=True, tie_word_embeddings=True, head_dim=16
        ),
        "mistral": lambda: transformers.MistralConfig(**SHARED, head_dim=8, sliding_window=None),
        "qwen2": lambda: transformers.Qwen2Config(**SHARED, tie_word_embeddings=True),
        "qwen3": lambda: transformers.Qwen3Config(**SHARED, head_dim=16),
        "gemma": lambda: transformers.GemmaConfig(**SHARED, head_dim=8),
        "gemma2": lambda: transformers.Gemma2Config(
            **SHARED, head_dim=8, query_pre_attn_scalar=8, sliding_window=6, attn_logit_softcapping=5.0,
            final_logit_softcapping=20.0,
        ),
        "gemma3": lambda: transformers.Gemma3TextConfig(
            **six, head_dim=8, query_pre_attn_scalar=8, sliding_window=6
        ),
        "phi": lambda: transformers.PhiConfig(**SHARED),
        "phi3": lambda: transformers.Phi3Config(**SHARED),
    }[kind]()  # fmt: skip


def model(kind: str) -> Any:
    """A model with random weights, norms and biases among them."""
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(config(kind), dtype=torch.float32)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.15) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    return made.eval()


def rows() -> Tensor:
    """Sixteen rows of 24 tokens, each with a step of its own: easy to learn."""
    start, step = torch.arange(16)[:, None], torch.arange(1, 17)[:, None]
    return (start + step * torch.arange(24)) % 125 + 3


@cache
def learnt(kind: str) -> Any:
    """A model that has learnt `rows`, so that what comes next is no matter of the last bit."""
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(config(kind), dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
    for _ in range(45):
        loss = made(rows(), labels=rows()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return made.eval()


@cache
def tokenizer() -> Tokenizer:
    """The tokenizer of all of them."""
    return Tokenizer.of(tiny_tokenizer())


def wide() -> Any:
    """A llama with rows of 256 numbers, random."""
    torch.manual_seed(0)
    sizes = {**SHARED, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 3}
    return transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**sizes), dtype=torch.float32).eval()


def whole(made: Any) -> Model:
    """A model as it is written."""
    return Model(name="tiny", config=made.config, tensors=made.state_dict(), tokenizer=tokenizer(),
                 template=tokenizer().chat_template, stop_ids=(1,))  # fmt: skip


