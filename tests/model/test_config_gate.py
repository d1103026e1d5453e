"""config.json: what reaches transformers, what is left out with a word, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from luthier.core.errors import CorruptError, LuthierError, RecipeError, UnsafeArtifactError
from luthier.model.files.config_gate import MAX_LAYERS, read_config
from tests.tiny import KINDS, tiny_config

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a llama config with some keys changed."""

    def made(**changes: Any) -> Path:
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**tiny_config("llama").to_dict(), **changes}), encoding="utf-8")
        return path

    return made


@pytest.mark.parametrize("kind", KINDS)
def test_an_honest_config_arrives_whole_and_without_a_word(kind: str, tmp_path: Path) -> None:
    """Breaks when the gate loses a key that changes what a model computes, or warns of what transformers wrote."""
    tiny_config(kind).save_pretrained(tmp_path)
    checked = read_config(tmp_path / "config.json")
    theirs, ours = AutoConfig.from_pretrained(tmp_path).to_dict(), checked.config.to_dict()
    for kept_elsewhere in ("_name_or_path", "dtype"):
        theirs.pop(kept_elsewhere, None), ours.pop(kept_elsewhere, None)
    assert ours == theirs
    assert checked.notices == ()


LLAMA_3 = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 64,
           "rope_type": "llama3"}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"rope_scaling": LLAMA_3, "rope_theta": 500000.0}, {"factor": 32.0, "rope_type": "llama3"}),
        ({"rope_scaling": None, "rope_theta": 1e6}, {"rope_theta": 1e6, "rope_type": "default"}),
    ],
)
def test_older_names_of_a_key_are_understood(write: Write, changes: dict[str, Any], found: dict[str, Any]) -> None:
    """Breaks when the positions of a model of two years ago are turned by another angle, without a word."""
    path = write(**changes, torch_dtype="bfloat16", transformers_version="4.45.0", pretraining_tp=1)
    values = json.loads(path.read_text("utf-8"))
    values.pop("rope_parameters")
    path.write_text(json.dumps(values), encoding="utf-8")
    checked = read_config(path)
    assert found.items() <= dict(checked.config.rope_parameters).items()
    assert checked.notices == ()


def test_what_no_class_declares_is_left_out_and_named(write: Write) -> None:
    """Breaks when a key from outside becomes an attribute of the config, or vanishes in silence."""
    checked = read_config(write(is_llama_config=True, rope_interleaved=False, **{"transformers.js_config": {"a": "b"}}))
    assert checked.notices == ("config.json: not used are is_llama_config, transformers.js_config",)
    assert not vars(checked.config).keys() & {"is_llama_config", "transformers.js_config"}


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_map": {"AutoConfig": "configuration_own.Own"}},
        {"auto_map": {}},
        {"trust_remote_code": False},
        {"rope_parameters": {"rope_type": "default", "auto_map": {"a": "b"}}},
        {"layer_types": [{"code_revision": "main"}]},
        {"attn_implementation": "owner/kernel"},
        {"_attn_implementation_internal": "owner/kernel"},
        {"_experts_implementation": "owner/kernel"},
        {"_attn_implementation_autoset": "owner/kernel"},
        {"custom_generate": "owner/code"},
        {"use_kernels": True},
        {"hidden_act": "owner/kernel"},
        {"hidden_act": "../act"},
        {"rope_parameters": {"a b": 1}},
    ],
    ids=str,
)
def test_what_could_steer_code_is_refused_wherever_it_stands(write: Write, changes: dict[str, Any]) -> None:
    """Breaks when a config can name code, or a place to fetch it from."""
    with pytest.raises(UnsafeArtifactError, match="code|text|key"):
        read_config(write(**changes))


def test_a_harmless_flag_of_older_versions_is_no_alarm(write: Write) -> None:
    """Breaks when every config that transformers 4.48 to 4.51 wrote is refused."""
    assert read_config(write(_attn_implementation_autoset=True)).notices == ()


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"model_type": "lama"}, RecipeError, r'model_type is "lama".*\(llama, '),
        ({"model_type": None}, RecipeError, "there is no model_type"),
        ({"model_type": ["llama"]}, RecipeError, "model_type is"),
        ({"quantization_config": {"quant_method": "gptq"}}, RecipeError, "the weights are quantized"),
        ({"num_hidden_layers": MAX_LAYERS + 1}, CorruptError, "at most 10000 layers"),
        ({"hidden_size": 2**60}, CorruptError, "hidden_size is 1152921504606846976"),
        ({"hidden_size": "many"}, CorruptError, "cannot be made from these values.*hidden_size"),
        ({"num_attention_heads": 5}, CorruptError, "cannot be made from these values.*heads"),
    ],
    ids=str,
)
def test_nonsense_is_refused_with_its_value(
    write: Write, changes: dict[str, Any], kind: type[LuthierError], words: str
) -> None:
    """Breaks when a wrong value reaches a model class and ends in a traceback."""
    with pytest.raises(kind, match=words):
        read_config(write(**changes))
