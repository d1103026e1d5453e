"""Tiny models whose rotary angles depend on how long a text is, with our blocks (llama) and with the zoo's (phi3)."""

from __future__ import annotations

from typing import Any, Final, Literal

import torch
from transformers import AutoModelForCausalLM, Phi3Config, PreTrainedModel

from luthier.model.attending import attention
from luthier.model.language_model import LanguageModel
from luthier.model.load import state_digest
from tests import forests
from tests.tiny import HIDDEN, LAYERS, VOCABULARY, tiny_config

SHORT: Final = 24
"""Texts of more places than these are turned as long ones."""
Kind = Literal["llama", "phi3"]


def zoo(kind: Kind, *, ours: bool = True) -> PreTrainedModel:
    """A tiny model of the zoo, every parameter random."""
    attention.register()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = AutoModelForCausalLM.from_config(_config(kind), dtype=torch.float32).eval()
    forests.shake(list(module.parameters()), std=0.15)
    module.set_attn_implementation(attention.NAME if ours else "sdpa")
    return module


def language_model(kind: Kind) -> LanguageModel:
    """The same as luthier has it."""
    module = zoo(kind)
    return LanguageModel(module, source=f"tiny/longrope-{kind}", digest=state_digest(module),
                         known_as=f"tiny/longrope-{kind}")  # fmt: skip


def _config(kind: Kind) -> Any:
    # As far apart as the factors of real models are, so that wrong angles show.
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 4.0, 8.0, 16.0], "original_max_position_embeddings": SHORT,
    }  # fmt: skip
    if kind == "llama":
        config = tiny_config("llama")
        config.rope_parameters = {**rope, "factor": 4.0}
        return config
    return Phi3Config(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=None,
        eos_token_id=1, original_max_position_embeddings=SHORT, rope_parameters=rope,
    )  # fmt: skip
