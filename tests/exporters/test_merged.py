"""merged: the type of the weights, the files they lie in, and what lies beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from luthier.data.prepare import Reading
from luthier.data.tokenizer import Tokenizer
from luthier.exporters import Subject
from luthier.exporters.merged import Merged
from luthier.model.parity import BRAIN, EXACT, HALF, Questions, compare, hear
from luthier.model.parity_sides import ModelSide
from tests import task_models
from tests.data import kinds
from tests.exported import exported, subject


@pytest.mark.parametrize(
    ("precision", "dtype", "tolerance"),
    [("auto", torch.float32, EXACT), ("bfloat16", torch.bfloat16, BRAIN), ("float16", torch.float16, HALF)],
)
def test_weights_are_in_the_type_that_was_asked_for(precision: str, dtype: torch.dtype, tolerance: object,
                                                    tmp_path: Path) -> None:  # fmt: skip
    given = subject("llama", tmp_path)
    exporter = Merged.model_validate({"precision": precision})
    assert exporter.tolerance(given) is tolerance
    report = exported(exporter, given, tmp_path / "out")
    assert report.passed, report.findings
    assert {each.dtype for each in load_file(tmp_path / "out" / "model.safetensors").values()} == {dtype}


def test_many_weights_make_several_files_with_an_index(tmp_path: Path) -> None:
    report = exported(Merged(shard_gb=3e-5), subject("llama", tmp_path, adapter="lora"), tmp_path / "out")
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert report.passed and len(shards) > 2 and sorted(set(index["weight_map"].values())) == shards


def test_a_classifier_keeps_its_classes(tmp_path: Path) -> None:
    """Breaks when the head is not written, or classes are called by their numbers."""
    tokenizer = Tokenizer.of(kinds.zoo("bert"))
    model = task_models.language_model("bert", task_models.TEXTS)
    given = Subject(name="x", base="bert", model=model, tokenizer=tokenizer, chat_template=None, stop_ids=(),
                    reading=Reading(kind="encoder", wanted=("labelled",), classes=task_models.CLASSES),
                    precision="float32")  # fmt: skip
    prompts = tuple(torch.arange(3, 3 + size, dtype=torch.int32).numpy() for size in (9, 20))
    said = hear(ModelSide("x", model), Questions(prompts))
    (tmp_path / "out").mkdir()
    Merged().write(given, tmp_path / "out", lambda _line: None)
    report = compare(said, Merged().read(given, tmp_path / "out"), EXACT)
    assert report.passed, report.findings
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert list(theirs.config.id2label.values()) == list(task_models.CLASSES)
    assert not (tmp_path / "out" / "generation_config.json").exists()
    assert "AutoModelForSequenceClassification" in Merged().usage(given) and "generate" not in Merged().usage(given)
