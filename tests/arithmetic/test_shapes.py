"""Parameters from a config alone: against models without memory, tensor by tensor, and against published counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from luthier.arithmetic.shapes import FAMILIES, shape_of
from luthier.core.errors import RecipeError
from tests.arithmetic.published import CONFIGS

SIZES = {
    "vocab_size": 131, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 77},
    "mixtral": {"num_local_experts": 5},
    **{key: {"head_dim": 10} for key in ("gemma", "gemma2", "gemma3_text", "qwen3")},
}
NOT_THEIRS = {
    "gpt2": {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"},
    "gpt_neox": {"num_key_value_heads"},
}
CHOICES = {"llama": [{"attention_bias": True}, {"mlp_bias": True}], "gpt_neox": [{"attention_bias": False}],
           "qwen3": [{"attention_bias": True}]}  # fmt: skip


def made(family: str, more: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """The config of a small model as transformers writes it, and the parameters of that model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {key: value for key, value in SIZES.items() if key not in NOT_THEIRS.get(family, set())}
    config = AutoConfig.for_model(family, **{**sizes, **OWN.get(family, {}), **more})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return config.to_dict(), sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shape_has_the_parameters_of_the_model(family: str) -> None:
    """Breaks when a norm, a bias, a tie or a fused product of a family is not known, or a default is another."""
    for more in [{}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False}, *CHOICES.get(family, [])]:
        config, count = made(family, more)
        assert shape_of(config).parameters == count, more
        # As a config.json is written, which leaves out what is as the family has it.
        short = {key: config[key] for key in ("model_type", *SIZES, *OWN.get(family, {}), *more) if key in config}
        assert shape_of(short).parameters == count, more


@pytest.mark.parametrize("name", CONFIGS)
def test_a_shape_has_the_parameters_that_were_published(name: str) -> None:
    config, published = CONFIGS[name]
    assert shape_of(config).parameters == published


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_that_do_not_divide_a_model_are_refused_where_the_zoo_refuses_them(family: str) -> None:
    """Breaks when answering is planned for a model that nobody can make, or not for one that can be made."""
    own = {"n_head" if family == "gpt2" else "num_attention_heads": 11}
    told = {"model_type": family, **SIZES, **OWN.get(family, {}), **own}
    try:
        config, count = made(family, own)
    except (StrictDataclassError, ValueError) as failure:
        assert any(word in str(failure) for word in ("multiple", "divisible")), failure
        with pytest.raises(RecipeError, match="a multiple of"):
            shape_of(told)
    else:
        assert shape_of(config).parameters == count


def test_windows_are_those_of_the_layers() -> None:
    """Breaks when a cache is planned for layers that look at all, or no window is taken for the default one."""
    size = {"hidden_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 9}

    def windows(**config: Any) -> tuple[int | None, ...]:
        return shape_of({**size, **config}).windows

    assert windows(model_type="mistral", sliding_window=None) == (None,) * 6
    assert windows(model_type="mistral") == (4096,) * 6
    assert windows(model_type="gemma2") == (4096, None) * 3
    assert windows(model_type="gemma3_text", sliding_window=512) == (*(512,) * 5, None)
    kinds = ["full_attention", "sliding_attention"] * 3
    assert windows(model_type="gemma2", sliding_window=7, layer_types=kinds) == (None, 7) * 3
    assert windows(model_type="qwen2", sliding_window=7) == (None,) * 6
    upper = windows(model_type="qwen2", sliding_window=7, use_sliding_window=True, max_window_layers=4)
    assert upper == (None, None, None, None, 7, 7)


def test_of_a_model_that_also_sees_the_text_is_planned() -> None:
    inner, count = made("gemma3_text", {})
    assert shape_of({"model_type": "gemma3", "text_config": inner, "vision_config": {}}).parameters == count


def test_experts_are_all_there_and_few_are_passed() -> None:
    shape = shape_of(CONFIGS["Mixtral-8x7B"][0])
    # 12.9B of 46.7B, as Mistral says: table and head included.
    assert round((shape.active + 2 * shape.table) / 1e9, 1) == 12.9


SMALL: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 10,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "lama"}, "model_type is 'lama'"),
        ({}, "model_type is 'None'"),
        ({"model_type": "llama"}, "num_hidden_layers: None"),
        ({"model_type": "llama", "num_hidden_layers": -3}, "num_hidden_layers: -3"),
        ({"model_type": "gpt2", "n_layer": "many"}, "n_layer: 'many'"),
        ({**SMALL, "num_hidden_layers": 10**12}, "num_hidden_layers: 1000000000000"),
        ({**SMALL, "vocab_size": 10**400}, "vocab_size: 10000"),
        ({**SMALL, "num_attention_heads": 128}, "num_attention_heads: 128"),
        ({**SMALL, "max_position_embeddings": "long"}, "max_position_embeddings: 'long'"),
        ({**SMALL, "max_position_embeddings": -5}, "max_position_embeddings: -5"),
        ({**SMALL, "model_type": "mistral", "sliding_window": "abc"}, "sliding_window: 'abc'"),
        ({**SMALL, "model_type": "mistral", "sliding_window": -4}, "sliding_window: -4"),
        ({**SMALL, "model_type": "gemma2", "sliding_window_pattern": 0}, "sliding_window_pattern: 0"),
        ({**SMALL, "model_type": "qwen2", "use_sliding_window": True, "max_window_layers": "x"}, "layers: 'x'"),
        ({**SMALL, "model_type": "mixtral", "num_local_experts": "8"}, "num_local_experts: '8'"),
        ({**SMALL, "model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 8}, "8, of 2 experts"),
    ],
)
def test_what_describes_no_shape_is_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said) as caught:
        shape_of(config)
    assert caught.value.allowed and caught.value.do


def test_kinds_of_layers_that_are_no_list_of_all_are_left_out() -> None:
    """Breaks when a cache is counted for other layers than the model has."""
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    for kinds in (3, ["sliding_attention"], None):
        assert shape_of({**SMALL, "model_type": "qwen2", **windows, "layer_types": kinds}).windows == (None, 8)
    named = {**SMALL, "model_type": "qwen2", **windows, "layer_types": ["sliding_attention", "full_attention"]}
    assert shape_of(named).windows == (8, None)
