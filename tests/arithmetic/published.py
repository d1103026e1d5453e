"""Configs of models that papers and tables speak of, with the parameters that their files have."""

from __future__ import annotations

from typing import Any, Final


def _llama(hidden: int, inner: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    return {"model_type": "llama", "vocab_size": 32000, **sizes, "num_attention_heads": heads, **more}


def _qwen(kind: str, hidden: int, inner: int, layers: int, heads: int, groups: int, **more: Any) -> dict[str, Any]:
    return {**_llama(hidden, inner, layers, heads), "model_type": kind, "num_key_value_heads": groups, **more}


CONFIGS: Final[dict[str, tuple[dict[str, Any], int]]] = {
    "LLaMA-7B": (_llama(4096, 11008, 32, 32), 6_738_415_616),
    "LLaMA-13B": (_llama(5120, 13824, 40, 40), 13_015_864_320),
    "LLaMA-33B": (_llama(6656, 17920, 60, 52), 32_528_943_616),
    "LLaMA-65B": (_llama(8192, 22016, 80, 64), 65_285_660_672),
    "Llama-2-70B": (_llama(8192, 28672, 80, 64, num_key_value_heads=8), 68_976_648_192),
    "Llama-3.1-8B": (_llama(4096, 14336, 32, 32, num_key_value_heads=8, vocab_size=128256), 8_030_261_248),
    "Llama-3.2-1B": (
        _llama(2048, 8192, 16, 32, num_key_value_heads=8, vocab_size=128256, head_dim=64, tie_word_embeddings=True),
        1_235_814_400,
    ),
    "Mistral-7B-v0.1": (
        {**_llama(4096, 14336, 32, 32, num_key_value_heads=8), "model_type": "mistral", "sliding_window": 4096},
        7_241_732_096,
    ),
    "Mixtral-8x7B": (
        {**_llama(4096, 14336, 32, 32, num_key_value_heads=8), "model_type": "mixtral", "num_local_experts": 8,
         "num_experts_per_tok": 2},
        46_702_792_704,
    ),
    "Qwen2.5-0.5B": (
        _qwen("qwen2", 896, 4864, 24, 14, 2, vocab_size=151936, tie_word_embeddings=True), 494_032_768,
    ),
    "Qwen2.5-7B": (_qwen("qwen2", 3584, 18944, 28, 28, 4, vocab_size=152064), 7_615_616_512),
    "Qwen3-0.6B": (
        _qwen("qwen3", 1024, 3072, 28, 16, 8, vocab_size=151936, head_dim=128, tie_word_embeddings=True), 596_049_920,
    ),
    "gpt2": (
        {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024},
        124_439_808,
    ),
    "phi-2": (
        {"model_type": "phi", "vocab_size": 51200, "hidden_size": 2560, "intermediate_size": 10240,
         "num_hidden_layers": 32, "num_attention_heads": 32},
        2_779_683_840,
    ),
    "Phi-3-mini": (
        {**_llama(3072, 8192, 32, 32, vocab_size=32064), "model_type": "phi3"}, 3_821_079_552,
    ),
    "gemma-2-2b": (
        {"model_type": "gemma2", "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216,
         "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
        2_614_341_888,
    ),
    "pythia-1.4b": (
        {"model_type": "gpt_neox", "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 8192,
         "num_hidden_layers": 24, "num_attention_heads": 16},
        1_414_647_808,
    ),
}  # fmt: skip
"""A config by name, and the number of parameters that the model card or the index of the weights gives."""


def config(name: str) -> dict[str, Any]:
    """The config of a model."""
    return CONFIGS[name][0]
