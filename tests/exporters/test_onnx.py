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
from luthier.exporters.onnx import GRAPH, Onnx
from luthier.model.comparing.parity import Questions, compare, hear
from luthier.model.comparing.parity_sides import ModelSide
from luthier.model.files.texts_beside import save_texts
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


def test_a_graph_is_asked_as_its_readers_ask_it(tmp_path: Path) -> None:
    """A graph made by hand, which writes a row of a table for each token: ids and mask reach it as they are."""
    onnx, _ = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    given, make = _subject("bert", MASKED), onnx.helper.make_node
    table = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    nodes = [make("Gather", ["table", "input_ids"], ["rows"]), make("Unsqueeze", ["attention_mask", "last"], ["wide"]),
             make("Cast", ["wide"], ["mask"], to=onnx.TensorProto.FLOAT), make("Mul", ["rows", "mask"], ["logits"])]
    places = {name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, ["b", "t"])
              for name in ("input_ids", "attention_mask")}  # fmt: skip
    out = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["b", "t", 6])
    held = [onnx.numpy_helper.from_array(value, name) for name, value in (("table", table), ("last", np.array([-1])))]
    graph = onnx.helper.make_graph(nodes, "x", list(places.values()), [out], held)
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(made, tmp_path / GRAPH)
    given.model.module.config.save_pretrained(tmp_path)
    save_texts(tmp_path, given.model, given.tokenizer, chat_template=None, stop_ids=())
    side = Onnx().read(given, tmp_path)
    tokens = np.array([3, 49, 3, 0], np.int32)
    assert np.array_equal(side.logits(tokens), table[tokens])
    assert side.settings() == {"tokenizer.tokens": given.tokenizer.vocabulary_size} and side.gives == "logits"


def test_a_model_that_generates_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is a llama model, which generates text") as caught:
        Onnx().require(subject("llama", tmp_path))
    assert "--to merged" in caught.value.do


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    given = _subject("bert", TEXTS)
    monkeypatch.setattr(optional.importlib, "import_module", absent)
    with pytest.raises(MissingError, match="an ONNX graph needs the package onnx") as caught:
        Onnx().require(given)
    assert 'pip install "luthier[onnx]"' in caught.value.do


def test_states_need_no_head() -> None:
    assert Onnx().reads_head and not Onnx(outputs="states").reads_head
    assert "[states] = session.run" in Onnx(outputs="states").usage(_subject("bert", MASKED))
