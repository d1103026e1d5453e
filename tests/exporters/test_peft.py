"""peft: the files of an adapter, the name of its base, and a model that has no adapter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from luthier.core.errors import RecipeError
from luthier.exporters.peft import Peft
from luthier.model.comparing.tolerances import EXACT
from luthier.model.files.json_files import write_object
from tests import task_models
from tests.exported import exported, subject


def test_the_tensors_are_the_very_ones(tmp_path: Path) -> None:
    given = subject("gpt2", tmp_path, adapter="dora", dtype=torch.bfloat16)
    assert Peft().tolerance(given) is EXACT and Peft().form == "adapter"
    report = exported(Peft(base="owner/base"), given, tmp_path / "out")
    assert report.passed and report.max_difference == 0
    ours, theirs = (tmp_path / each / "adapter_model.safetensors" for each in ("adapter", "out"))
    assert ours.read_bytes() == theirs.read_bytes() and Peft().needed_bytes(given) == ours.stat().st_size
    before, after = (json.loads((tmp_path / each / "adapter_config.json").read_text()) for each in ("adapter", "out"))
    assert after == {**before, "base_model_name_or_path": "owner/base"}
    assert 'from_pretrained("owner/base")' in Peft(base="owner/base").usage(given)


def test_a_model_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="has no adapter") as caught:
        Peft().require(subject("llama", tmp_path))
    assert "--to merged" in caught.value.do


def test_how_it_is_used(tmp_path: Path) -> None:
    """Breaks when a card tells to load a classifier as a model that says text, or an adapter of ours with PEFT."""
    given = subject("llama", tmp_path, adapter="lora")
    said = Peft().usage(given)
    assert "AutoModelForCausalLM.from_pretrained" in said and "luthier generate" in said
    write_object(tmp_path / "adapter" / "luthier.json", {"quantizer": {"method": "none"}})
    assert "trained beside" not in said + Peft().usage(given)
    write_object(tmp_path / "adapter" / "luthier.json", {"quantizer": {"method": "nf4"}})
    assert "trained beside weights in nf4" in Peft().usage(given)
    classifier = replace(given, model=task_models.language_model("bert", task_models.TEXTS))
    said = Peft().usage(classifier)
    assert "AutoModelForSequenceClassification" in said and "generate" not in said
    assert f"num_labels={len(task_models.CLASSES)}" in said
    (tmp_path / "more").mkdir()
    said = Peft().usage(subject("llama", tmp_path / "more", adapter="bottleneck"))
    assert "PEFT has no adapter of the kind BOTTLENECK" in said and "PeftModel" not in said
