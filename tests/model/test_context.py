"""The longest text of a model is what its config class says, whether or not the class had to be asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING

from luthier.core.errors import LuthierError
from luthier.model.files.configs import config_of
from luthier.model.files.context import context_tokens

USUAL = ("llama", "qwen2", "gpt2", "gemma2", "mistral", "bert", "t5", "bart", "gemma3", "encodec", "mamba", "phi3")
LIMIT = "max_position_embeddings"


def written(folder: Path, values: dict[str, object]) -> str:
    (folder / "config.json").write_text(json.dumps(values, default=str))
    return str(folder)


def demand_what_the_class_says(kind: str, folder: Path) -> None:
    config = CONFIG_MAPPING[kind]().to_dict()
    without = {key: value for key, value in config.items() if key != LIMIT}
    # A class that has no such number drops the key, which no file of such a model has.
    for values in (config, {**config, LIMIT: 77}, without) if LIMIT in config else (config,):
        place = written(folder, values)
        try:
            wanted = getattr(config_of(place).get_text_config(), LIMIT, None)
        except (LuthierError, ValueError):
            continue  # a config that no model may have, or one of several models; whoever loads it says so
        assert context_tokens(place) == (wanted or None), kind


@pytest.mark.parametrize("kind", USUAL)
def test_it_is_what_the_config_class_says(kind: str, tmp_path: Path) -> None:
    demand_what_the_class_says(kind, tmp_path)


@pytest.mark.slow
def test_it_is_what_each_config_class_says(tmp_path: Path) -> None:
    for kind in CONFIG_MAPPING:
        try:
            CONFIG_MAPPING[kind]()
        except (ImportError, ValueError, TypeError, StrictDataclassError):
            continue  # needs a package that is not here, or parts that are given to it
        demand_what_the_class_says(kind, tmp_path)


@pytest.mark.parametrize("value", ["many", -1, 0, True, 2.5, None])
def test_what_is_no_length_is_left_to_the_class(value: object, tmp_path: Path) -> None:
    place = written(tmp_path, {**CONFIG_MAPPING["llama"]().to_dict(), LIMIT: value})
    found: list[object] = []
    for ask in (lambda: context_tokens(place), lambda: getattr(config_of(place), LIMIT)):
        try:
            found.append(ask() or None)
        except LuthierError as error:
            found.append(error.received)
    assert found[0] == found[1]


def test_a_folder_without_a_config_says_so(tmp_path: Path) -> None:
    with pytest.raises(LuthierError, match=r"no config\.json"):
        context_tokens(str(tmp_path))
