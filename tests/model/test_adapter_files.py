"""The strict loader of adapter files: what is wrong with a folder is said, and nothing of it is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.adapters import adapter_of, saved_adapter
from luthier.adapters.lora import LoRA
from luthier.core.errors import CorruptError, DriftError, LuthierError, RecipeError, UnsafeArtifactError
from luthier.model.editing.attachment import Attachment
from luthier.model.files.adapter_config import CONFIG, EXTRAS, TENSORS, read_config, read_extras
from luthier.model.files.adapter_files import check_base, fill, save_adapter
from luthier.model.language_model import LanguageModel
from tests import forests

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def saved(tmp_path: Path) -> tuple[LanguageModel, Path]:
    """A model and the folder of a LoRA that was trained on it."""
    model = forests.language_model("llama")
    adapter = LoRA(rank=2, targets=("q", "v"))
    attachment = model.attach(adapter.attach(model.sites))
    forests.shake(attachment.named_parameters().values())
    folder = tmp_path / "adapter"
    extras = {"base_digest": model.digest, "run": "a-run"}
    config = adapter.peft_config(model.sites)
    save_adapter(folder, attachment, peft_type="LORA", config=config, base="tiny/llama", extras=extras)
    model.detach()
    return model, folder


def load(model: LanguageModel, folder: Path) -> Attachment:
    """Everything a caller does with a folder."""
    adapter = saved_adapter(folder, model.sites)
    check_base(folder, model)
    attachment = model.attach(adapter.attach(model.sites))
    fill(attachment, folder)
    return attachment


def without_first(tensors: Tensors) -> Tensors:
    """One tensor less."""
    return dict(list(tensors.items())[1:])


def with_stranger(tensors: Tensors) -> Tensors:
    """One tensor that has no place."""
    return {**tensors, "base_model.model.lm_head.lora_A.weight": torch.zeros(2, 32)}


def with_wrong_shape(tensors: Tensors) -> Tensors:
    """The last tensor one column short."""
    name = sorted(tensors)[-1]
    return {**tensors, name: tensors[name][:, :-1].contiguous()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_first, "1 expected tensors are missing"),
        (with_stranger, "1 have no place"),
        (with_wrong_shape, "has shape"),
    ],
)
def test_a_file_that_does_not_fit_loads_nothing(
    saved: tuple[LanguageModel, Path], change: Callable[[Tensors], Tensors], words: str
) -> None:
    """Breaks when a tensor is passed over, broadcast, or copied before the others were looked at."""
    model, folder = saved
    save_file(change(load_file(folder / TENSORS)), folder / TENSORS)
    attachment = model.attach(adapter_of(read_config(folder)).attach(model.sites))
    before = attachment.digest()
    with pytest.raises(CorruptError, match=words):
        fill(attachment, folder)
    assert attachment.digest() == before


def test_a_file_cut_short_is_corrupt(saved: tuple[LanguageModel, Path]) -> None:
    """Breaks when the error of the file library reaches the user."""
    model, folder = saved
    whole = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptError, match="no sound safetensors file"):
        load(model, folder)


def test_another_base_is_drift(saved: tuple[LanguageModel, Path]) -> None:
    """Breaks when an adapter goes on weights it was not trained on."""
    _, folder = saved
    with pytest.raises(DriftError, match="trained on base weights"):
        load(forests.language_model("llama", seed=1), folder)


def test_an_adapter_from_elsewhere_names_no_base_and_loads(saved: tuple[LanguageModel, Path]) -> None:
    """Breaks when files without our extras are refused."""
    model, folder = saved
    (folder / EXTRAS).unlink()
    assert read_extras(folder) == {}
    assert load(model, folder).parameter_count == LoRA(rank=2, targets=("q", "v")).parameter_count(model.sites)


def test_a_pickle_is_refused_for_what_it_is(saved: tuple[LanguageModel, Path]) -> None:
    """Breaks when a pickled adapter is opened, or called merely missing."""
    model, folder = saved
    (folder / TENSORS).rename(folder / "adapter_model.bin")
    with pytest.raises(UnsafeArtifactError, match="pickle"):
        load(model, folder)


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        (CONFIG, None, RecipeError),
        (TENSORS, None, CorruptError),
        (CONFIG, "{", CorruptError),
        (CONFIG, "[]", CorruptError),
        (EXTRAS, "nonsense", CorruptError),
        (CONFIG, '{"peft_type": "VERA"}', RecipeError),
    ],
)
def test_a_folder_that_is_not_whole_says_what_is_wrong(
    saved: tuple[LanguageModel, Path], name: str, text: str | None, kind: type[LuthierError]
) -> None:
    """Breaks when a missing or broken file ends in a traceback of another library."""
    model, folder = saved
    (folder / name).unlink() if text is None else (folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(kind, match=name if text != '{"peft_type": "VERA"}' else "LORA"):
        load(model, folder)


def test_files_hold_float32_and_sorted_json(saved: tuple[LanguageModel, Path]) -> None:
    """Breaks when a run's precision or key order decides about the bytes."""
    _, folder = saved
    assert {tensor.dtype for tensor in load_file(folder / TENSORS).values()} == {torch.float32}
    config = json.loads((folder / CONFIG).read_text("utf-8"))
    assert list(config) == sorted(config)
    assert config["base_model_name_or_path"] == "tiny/llama" and config["task_type"] == "CAUSAL_LM"
    assert read_extras(folder)["run"] == "a-run"


def change_config(folder: Path, **changes: object) -> None:
    """Other values in adapter_config.json."""
    config = json.loads((folder / CONFIG).read_text("utf-8"))
    (folder / CONFIG).write_text(json.dumps({**config, **changes}), encoding="utf-8")


@pytest.mark.parametrize(
    "text",
    [
        '{"peft_type": "LORA", "peft_type": "IA3"}',
        '{"peft_type": "LORA", "r": NaN}',
        '{"peft_type": "LORA", "r": 1e999}',
        '{"peft_type": "LORA", "x": ' + "[" * 5000 + "]" * 5000 + "}",
        '{"peft_type": "LORA", "x": "\\ud800"}',
        '{"peft_type": "LORA"} {}',
        "\x00",
    ],
    ids=["twice", "nan", "infinite", "deep", "surrogate", "more", "nul"],
)
def test_a_config_that_is_not_strict_json_is_corrupt(saved: tuple[LanguageModel, Path], text: str) -> None:
    """Breaks when two readers of one file could see different settings, or a nest of brackets ends in a traceback."""
    model, folder = saved
    (folder / CONFIG).write_text(text, encoding="utf-8")
    with pytest.raises(CorruptError, match=CONFIG):
        load(model, folder)


def test_a_config_of_any_size_is_not_read(saved: tuple[LanguageModel, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a settings file can fill the memory."""
    model, folder = saved
    monkeypatch.setattr("luthier.model.files.json_files.MAX_BYTES", 100)
    with pytest.raises(CorruptError, match="larger than 100 bytes"):
        load(model, folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"r": "many"}, {"r": None}, {"r": -1}, {"r": 1.5e300}, {"r": []}, {"lora_alpha": {}}, {"lora_alpha": 0},
        {"target_modules": None}, {"target_modules": 7}, {"target_modules": [7]}, {"target_modules": ["nowhere"]},
        {"lora_dropout": "x"}, {"peft_type": ["LORA"]}, {"trainable_token_indices": {"a": 1}},
        {"trainable_token_indices": [10**30]}, {"peft_type": "PREFIX_TUNING"},
        {"peft_type": "IA3", "target_modules": 3},
        {"peft_type": "TRAINABLE_TOKENS"}, {"peft_type": "TRAINABLE_TOKENS", "token_indices": 4},
    ],
    ids=str,
)  # fmt: skip
def test_a_config_with_nonsense_is_refused_in_words(
    saved: tuple[LanguageModel, Path], changes: dict[str, object]
) -> None:
    """Breaks when a value of another type reaches a constructor and ends in a traceback."""
    model, folder = saved
    change_config(folder, **changes)
    with pytest.raises(LuthierError):
        load(model, folder)
    assert model.attachments == {}


@pytest.mark.parametrize("changes", [{"r": 10**9}, {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 10**9}])
def test_a_config_that_asks_for_more_than_its_file_makes_nothing(
    saved: tuple[LanguageModel, Path], changes: dict[str, object]
) -> None:
    """Breaks when a number in a small file allocates the memory of a large model."""
    model, folder = saved
    change_config(folder, **changes)
    with pytest.raises(CorruptError, match="describes .* parameters, the tensor file holds 448"):
        load(model, folder)


def test_a_pattern_from_a_file_is_never_run(saved: tuple[LanguageModel, Path]) -> None:
    """Breaks when a regular expression that takes for ever comes with an adapter. The file's tensors say its sites."""
    model, folder = saved
    expected = load(model, folder).digest()
    model.detach()
    change_config(folder, target_modules=r"(([a-z0-9_]+\.?)+)+(q|v)_proj!?")
    assert len(read_config(folder)["target_modules"]) == 4
    assert load(model, folder).digest() == expected
