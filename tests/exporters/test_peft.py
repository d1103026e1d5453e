"""peft: the files of an adapter, the name of its base, and a model that has no adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from luthier.core.errors import RecipeError
from luthier.exporters.peft import Peft
from luthier.model.parity import EXACT
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
