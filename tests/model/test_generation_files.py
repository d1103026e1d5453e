"""generation_config.json: other programs stop where the run's answers stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from luthier.core.errors import CorruptError
from luthier.model.files.generation_files import GENERATION, read_stop_ids, save_generation_config
from tests import forests


@pytest.mark.parametrize(("stops", "written"), [({7}, 7), ({9, 1, 7}, [1, 7, 9])])
def test_every_stop_token_is_written_and_read(stops: set[int], written: object, tmp_path: Path) -> None:
    """Breaks when only the tokenizer's eos reaches the file, or the order of a set does."""
    model = forests.language_model("llama")
    path = save_generation_config(tmp_path, model, stops, pad_id=0, bos_id=None)
    values = json.loads(path.read_text("utf-8"))
    assert values["eos_token_id"] == written and values["pad_token_id"] == 0 and "bos_token_id" not in values
    assert read_stop_ids(tmp_path) == stops
    first = path.read_bytes()
    save_generation_config(tmp_path, model, sorted(stops, reverse=True), pad_id=0)
    assert path.read_bytes() == first


def test_what_the_base_says_of_sampling_is_kept_and_nothing_else(tmp_path: Path) -> None:
    """Breaks when a base's temperature is lost, or a text from its file, which could name code, is passed on."""
    model = forests.language_model("llama")
    model.module.generation_config = GenerationConfig(
        temperature=0.6, do_sample=True, suppress_tokens=[3, 4], cache_implementation="static", eos_token_id=[90, 91]
    )
    path = save_generation_config(tmp_path, model, {1}, pad_id=0, bos_id=2)
    values = json.loads(path.read_text("utf-8"))
    version = values.pop("transformers_version")
    assert version.count(".") >= 2
    assert values == {
        "temperature": 0.6, "do_sample": True, "suppress_tokens": [3, 4], "eos_token_id": 1, "pad_token_id": 0,
        "bos_token_id": 2,
    }  # fmt: skip


def test_transformers_stops_there(tmp_path: Path) -> None:
    """Breaks when a program that reads the folder goes on after a trained stop token."""
    model = forests.language_model("llama")
    module = AutoModelForCausalLM.from_config(model.module.config, dtype=torch.float32).eval()
    module.load_state_dict(model.module.state_dict())
    prompt = torch.tensor([[5, 17, 90]])
    endless = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=0)
    free = module.generate(prompt, generation_config=endless)[0, 3:].tolist()
    stop = free[4]
    save_generation_config(tmp_path, model, {1, stop}, pad_id=0)
    config = GenerationConfig.from_pretrained(tmp_path)
    assert config.eos_token_id == sorted({1, stop}) and config.pad_token_id == 0
    config.max_new_tokens = 12
    said = module.generate(prompt, generation_config=config)[0, 3:].tolist()
    assert said == free[: free.index(stop) + 1] and len(said) < 12


def test_without_any_stop_token_none_is_named(tmp_path: Path) -> None:
    """Breaks when a run on texts that end in nothing fails at its end, or stops at a token it never saw."""
    model = forests.language_model("llama")
    assert model.module.generation_config.eos_token_id == 1
    save_generation_config(tmp_path, model, ())
    assert read_stop_ids(tmp_path) == frozenset()
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [("{}", set()), ('{"eos_token_id": null}', set()), ('{"eos_token_id": [3, "x", true, -1, 4.5, 6]}', {3, 6}),
     ('{"eos_token_id": "3"}', set())],
)  # fmt: skip
def test_other_files_are_read_for_what_is_a_token(text: str, expected: set[int], tmp_path: Path) -> None:
    """Breaks when a file from elsewhere puts something else than ids among the stop tokens."""
    assert read_stop_ids(tmp_path) == frozenset()
    (tmp_path / GENERATION).write_text(text, encoding="utf-8")
    assert read_stop_ids(tmp_path) == expected


def test_a_broken_file_is_corrupt(tmp_path: Path) -> None:
    """Breaks when a cut file means no stop tokens at all."""
    (tmp_path / GENERATION).write_text('{"eos_token_id": [1', encoding="utf-8")
    with pytest.raises(CorruptError, match=GENERATION):
        read_stop_ids(tmp_path)
