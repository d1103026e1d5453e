"""Old keys: what transformers 4.57.3 read from configs written here, and that 5 reads the same from both.

The expected values were read by transformers 4.57.3 itself (AutoConfig.from_pretrained) from these very configs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from luthier.model.files.old_keys import tokenizer_with_old_keys, with_old_keys

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 1024}  # fmt: skip
SCALED = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
TWO = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
       "sliding_attention": {"rope_type": "default", "rope_theta": 12345.0}}  # fmt: skip
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 48, "long_factor": [2.0] * 48,
        "original_max_position_embeddings": 1024, "partial_rotary_factor": 1.0}  # fmt: skip
CASES: list[tuple[Any, dict[str, Any]]] = [
    (transformers.LlamaConfig(rope_parameters=LLAMA3, max_position_embeddings=8192),
     {"rope_theta": 5e5, "rope_scaling": SCALED}),
    (transformers.Qwen2Config(rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
     {"rope_theta": 1e6, "rope_scaling": None}),
    (transformers.Gemma3TextConfig(rope_parameters=TWO),
     {"rope_theta": 1e6, "rope_local_base_freq": 12345.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    (transformers.PhiConfig(rope_parameters={"rope_theta": 2e4, "partial_rotary_factor": 0.25, "rope_type": "default"}),
     {"rope_theta": 2e4, "partial_rotary_factor": 0.25, "rope_scaling": None}),
    (transformers.Phi3Config(rope_parameters=LONG, original_max_position_embeddings=1024),
     {"rope_theta": 10000.0, "original_max_position_embeddings": 1024,
      "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}}),
    (transformers.ModernBertConfig(), {"global_rope_theta": 160000.0, "local_rope_theta": 10000.0}),
    (transformers.GPTNeoXConfig(rope_parameters={"rope_theta": 2e4, "partial_rotary_factor": 0.5,
                                                 "rope_type": "default"}),
     {"rotary_emb_base": 2e4, "rotary_pct": 0.5}),
    (transformers.GPT2Config(), {}),
]  # fmt: skip


@pytest.mark.parametrize(("config", "old"), CASES, ids=[config.model_type for config, _ in CASES])
def test_older_readers_find_their_keys_and_newer_ones_the_same(config: Any, old: Any, tmp_path: Path) -> None:
    """Breaks when an old key is missing or renamed, or when it leads transformers 5 to another base."""
    config.dtype = "bfloat16"
    config.save_pretrained(tmp_path)
    plain = json.loads((tmp_path / "config.json").read_text())
    made = with_old_keys(plain)
    assert {key: made.get(key) for key in old} == old and made["torch_dtype"] == "bfloat16"
    assert {key: made[key] for key in plain} == plain
    (tmp_path / "config.json").write_text(json.dumps(made))
    again = transformers.AutoConfig.from_pretrained(tmp_path)
    before, after = getattr(config, "rope_parameters", None) or {}, getattr(again, "rope_parameters", None) or {}
    assert {key: after.get(key) for key in before} == before


def test_what_is_there_stays() -> None:
    kept = {"dtype": "float32", "torch_dtype": "x", "rope_theta": 1, "rope_parameters": {"rope_theta": 2}}
    assert with_old_keys(kept) == {**kept, "rope_scaling": None}
    odd = {"rope_parameters": {"full_attention": {"rope_theta": 1}, "sliding_attention": {"rope_theta": 2}},
           "model_type": "unheard of"}  # fmt: skip
    assert with_old_keys(odd) == odd


def test_control_tokens_stand_where_both_lines_look() -> None:
    """transformers 4 takes `extra_special_tokens` for a mapping, and stops at a list."""
    made = tokenizer_with_old_keys({"extra_special_tokens": ["<a>"], "x": 1}, chat_template="T")
    assert made == {"additional_special_tokens": ["<a>"], "x": 1, "chat_template": "T"}
    kept = {"extra_special_tokens": {"image": "<i>"}}
    assert tokenizer_with_old_keys(kept, chat_template=None) == kept
