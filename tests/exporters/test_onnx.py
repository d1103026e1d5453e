"""onnx: the graph gives what the encoder gives, at any length; models that generate are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from luthier.core import optional
from luthier.core.errors import MissingError, RecipeError
from luthier.data.prepare import Reading
from luthier.data.tokenizer import Tokenizer
from luthier.exporters import Subject
from luthier.exporters.onnx import Onnx
from luthier.model.parity import Questions, compare, hear
from luthier.model.parity_sides import ModelSide
from luthier.model.tasks import Task
from tests import task_models
from tests.data import kinds
from tests.exported import subject
from tests.task_models import MASKED, TEXTS


def _subject(architecture: str, task: Task) -> Subject:
    model = task_models.language_model(architecture, task)
    wanted = ("labelled",) if task == TEXTS else None
    reading = Reading(kind="encoder", wanted=wanted, classes=task.classes or None)
    return Subject(name="x", base=architecture, model=model, tokenizer=Tokenizer.of(kinds.zoo("bert")),
                   chat_template=None, stop_ids=(), reading=reading, precision="float32")  # fmt: skip


@pytest.mark.slow  # torch's exporter alone takes seconds to start
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("architecture", "task", "outputs"),
    [("bert", TEXTS, "logits"), ("bert", TEXTS, "states"), ("distilbert", MASKED, "logits"),
     ("modernbert", TEXTS, "logits")],
)  # fmt: skip
def test_the_graph_is_the_encoder(architecture: str, task: Task, outputs: str, tmp_path: Path) -> None:
    """Breaks when a length is burnt into the graph, types are left out, or the head is another."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    exporter, given = Onnx.model_validate({"outputs": outputs}), _subject(architecture, task)
    exporter.require(given)
    prompts = tuple(np.arange(3, 3 + size, dtype=np.int32) for size in (1, 5, 7, 40))
    said = hear(ModelSide("x", given.model, states=outputs == "states"), Questions(prompts))
    exporter.write(given, tmp_path, lambda _line: None)
    side = exporter.read(given, tmp_path)
    report = compare(said, side, exporter.tolerance(given))
    assert report.passed, report.findings
    assert (report.mean_kl is None) == (outputs == "states") and 0 < report.max_difference < 1e-4
    if task == TEXTS:
        assert list(json.loads((tmp_path / "config.json").read_text())["id2label"].values()) == list(TEXTS.classes)
    other = _subject(architecture, task)
    for parameter in other.model.module.parameters():
        parameter.data *= 1.1
    wrong = hear(ModelSide("x", other.model, states=outputs == "states"), Questions(prompts))
    assert not compare(wrong, side, exporter.tolerance(given)).passed


def test_a_model_that_generates_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is a llama model, which generates text") as caught:
        Onnx().require(subject("llama", tmp_path))
    assert "--to merged" in caught.value.do


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(optional.importlib, "import_module", absent)
    with pytest.raises(MissingError, match="an ONNX graph needs the package onnx") as caught:
        Onnx().require(_subject("bert", TEXTS))
    assert 'pip install "luthier[onnx]"' in caught.value.do


def test_states_need_no_head() -> None:
    assert Onnx().reads_head and not Onnx(outputs="states").reads_head
    assert "[states] = session.run" in Onnx(outputs="states").usage(_subject("bert", MASKED))
