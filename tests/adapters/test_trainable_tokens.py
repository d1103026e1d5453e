"""Trainable tokens: which rows, what the files say of them, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.adapters import Adapter, adapter_of, saved_adapter
from luthier.adapters.lora import LoRA
from luthier.adapters.trainable_tokens import TrainableTokens
from luthier.core.errors import CorruptError, RecipeError
from luthier.core.knobs import validate
from luthier.model.files.adapter_config import CONFIG, TENSORS, read_config
from luthier.model.files.adapter_files import fill
from luthier.train.result import save_result
from tests import forests
from tests.tiny import HIDDEN

NAMES = {"<|end|>": 1, "<|start|>": 2}


def no_text(text: str) -> list[int]:
    """What encodes texts of more than one token: these methods have none."""
    raise AssertionError(text)


def saved(method: Adapter, architecture: str, folder: Path) -> Path:
    """A folder with the adapter, moved away from its start."""
    model = forests.language_model(architecture)
    attachment = model.attach(method.attach(model.sites))
    forests.shake(attachment.named_parameters().values())
    return save_result(folder, model, attachment, method, {})


def test_without_a_name_the_models_own_stop_token_is_trained() -> None:
    """Breaks when the default trains nothing, or more than what ends a text."""
    model = forests.language_model("llama")
    assert model.sites.stop_ids == (1,)
    (rows,) = model.attach(TrainableTokens().attach(model.sites)).named_parameters().values()
    expected = torch.stack([site.weight()[1] for site in model.sites.role("embed", "head")])
    assert torch.equal(rows, expected)
    with pytest.raises(RecipeError, match="no token is named"):
        TrainableTokens().attach(replace(model.sites, stop_ids=()))


def test_texts_become_ids_and_answers_stop_where_the_data_says() -> None:
    """Breaks when a text reaches the file, or the config's stop token is trained in place of the template's."""
    method = TrainableTokens(tokens=("<|start|>", 7)).with_token_ids(NAMES.__getitem__, (1,), no_text)
    assert method.tokens == (2, 7)
    assert TrainableTokens().with_token_ids(NAMES.__getitem__, (1, 2), no_text).tokens == (1, 2)
    assert LoRA().with_token_ids(NAMES.__getitem__, (1,), no_text) == LoRA()
    assert LoRA(trainable_tokens=("<|end|>",)).with_token_ids(NAMES.__getitem__, (), no_text).trainable_tokens == (1,)


def test_a_recipe_names_tokens_by_text_or_id() -> None:
    """Breaks when a list from YAML is refused, or a number becomes a text."""
    assert validate(TrainableTokens, {"tokens": ["<|end|>", 7]}).tokens == ("<|end|>", 7)
    for wrong in ({"tokens": 7}, {"tokens": [1.5]}, {"targets": [3]}):
        with pytest.raises(RecipeError):
            validate(TrainableTokens, wrong)


@pytest.mark.parametrize(
    ("architecture", "targets", "module", "keys"),
    [
        ("llama", ("embed", "head"), ["model.embed_tokens", "lm_head"], ["lm_head", "model.embed_tokens"]),
        ("llama", ("embed",), "model.embed_tokens", ["model.embed_tokens"]),
        ("llama", ("head",), "lm_head", ["lm_head"]),
        ("gpt2", ("embed",), "transformer.wte", ["lm_head", "transformer.wte"]),
    ],
)
def test_the_file_is_peft_s(
    architecture: str, targets: tuple[str, ...], module: object, keys: list[str], tmp_path: Path
) -> None:
    """Breaks when a key or a name differs from what PEFT 0.21 writes."""
    method = TrainableTokens(tokens=(9, 4), targets=targets)
    folder = saved(method, architecture, tmp_path)
    config = json.loads((folder / CONFIG).read_text("utf-8"))
    assert (config["peft_type"], config["token_indices"]) == ("TRAINABLE_TOKENS", [9, 4])
    assert config["target_modules"] == module
    tensors = load_file(folder / TENSORS)
    assert sorted(tensors) == [f"base_model.model.{key}.trainable_tokens_delta" for key in keys]
    assert {tuple(tensor.shape) for tensor in tensors.values()} == {(2, HIDDEN)}
    again = adapter_of(read_config(folder))
    sites = forests.language_model(architecture).sites
    assert again.peft_config(sites) == method.peft_config(sites)


@pytest.mark.parametrize(
    ("architecture", "targets", "indices"),
    [
        ("llama", ("embed", "head"), {"lm_head": [9, 4], "model.embed_tokens": [9, 4]}),
        ("llama", ("embed",), [9, 4]),
        ("qwen2", ("embed", "head"), [9, 4]),
    ],
)
def test_the_lora_file_says_it_in_peft_s_words(
    architecture: str, targets: tuple[str, ...], indices: object, tmp_path: Path
) -> None:
    """Breaks when a tied model names its head, or an untied one loses it."""
    method = LoRA(rank=2, targets=("q",), trainable_tokens=(9, 4), trainable_token_targets=targets)
    folder = saved(method, architecture, tmp_path)
    assert read_config(folder)["trainable_token_indices"] == indices
    keys = [key for key in load_file(folder / TENSORS) if "lora" not in key]
    assert all(key.endswith(".token_adapter.trainable_tokens_delta") for key in keys)
    assert len(keys) == (2 if isinstance(indices, dict) else 1)
    model = forests.language_model(architecture)
    attachment = model.attach(saved_adapter(folder, model.sites).attach(model.sites))
    fill(attachment, folder)
    assert LoRA().peft_config(model.sites)["trainable_token_indices"] is None


@pytest.mark.parametrize(
    "indices", [{"embed_tokens": [1], "lm_head": [2]}, "embed_tokens", 3, {"embed_tokens": [None]}, [{}]]
)
def test_other_trained_tokens_of_a_lora_file_are_refused(indices: Any) -> None:
    """Breaks when modules with different tokens are read as if they had the same, or nonsense is a traceback."""
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    assert adapter_of({**config, "trainable_token_indices": None}) == adapter_of(config)
    with pytest.raises(RecipeError):
        adapter_of({**config, "trainable_token_indices": indices})


def test_a_shared_row_with_two_values_is_corrupt(tmp_path: Path) -> None:
    """Breaks when one of two values for one parameter is taken without a word."""
    folder = saved(TrainableTokens(tokens=(9,)), "qwen2", tmp_path)
    tensors = load_file(folder / TENSORS)
    tensors["base_model.model.lm_head.trainable_tokens_delta"] += 1
    save_file(tensors, folder / TENSORS)
    model = forests.language_model("qwen2")
    attachment = model.attach(saved_adapter(folder, model.sites).attach(model.sites))
    with pytest.raises(CorruptError, match="one matrix for both"):
        fill(attachment, folder)
