"""merged: the type of the weights, the files they lie in, and what lies beside them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from luthier.data.prepare import Reading
from luthier.data.tokenizer import Tokenizer
from luthier.exporters import Subject
from luthier.exporters.merged import Merged
from luthier.model.comparing.parity import Questions, compare, hear
from luthier.model.comparing.parity_sides import ModelSide
from luthier.model.comparing.tolerances import BRAIN, EXACT, HALF
from luthier.model.editing import merging
from luthier.model.files.shards import ShardWriter
from tests import task_models
from tests.architecture.source import REPOSITORY, SOURCE
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


def test_one_tensor_is_copied_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when old weights wait until all are folded, or copies until a file is written."""
    given = subject("llama", tmp_path, adapter="lora")
    old, copies, most = [], [], {"old": 0, "copies": 0}
    with_edit, write = merging._with_edit, ShardWriter.write

    def folded(edit: Any, module: Any, rounding: Any) -> Any:
        most["old"] = max(most["old"], sum(each() is not None for each in old))
        old.append(weakref.ref(module.weight))
        return with_edit(edit, module, rounding)

    def written(self: ShardWriter, name: str, tensor: np.ndarray, first: int = 0) -> None:
        most["copies"] = max(most["copies"], sum(each() is not None for each in copies))
        copies.append(weakref.ref(tensor))
        write(self, name, tensor, first)

    monkeypatch.setattr(merging, "_with_edit", folded)
    monkeypatch.setattr(ShardWriter, "write", written)
    report = exported(Merged(precision="float16"), given, tmp_path / "out")
    assert report.passed and len(old) > 10 and len(copies) > 20
    # The one before may wait for its successor.
    assert most["old"] <= 1 and most["copies"] <= 1


PEAK = """
import re, sys
from pathlib import Path
from luthier.exporters.merged import Merged
import torch
from transformers import LlamaConfig, AutoModelForCausalLM
from luthier.adapters.lora import LoRA
from luthier.model.attending import attention
from luthier.model.language_model import LanguageModel
from tests.exported import subject
from dataclasses import replace
place = Path(sys.argv[1])
attention.register()
config = LlamaConfig(vocab_size=16000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=6,
                     num_attention_heads=8, num_key_value_heads=8)
module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
model = LanguageModel(module, source="synthetic", digest="x")
model.attach(LoRA().attach(model.sites))
given = replace(subject("llama", place), model=model)
def status(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
model.merge("default", reversible=False)
(place / "out").mkdir()
Merged(precision="bfloat16").write(given, place / "out", lambda _line: None)
print(sum(each.numel() * 4 for each in module.parameters()), status("VmHWM") - before)
"""


@pytest.mark.slow
def test_no_second_copy_of_the_model_is_held(tmp_path: Path) -> None:
    """Breaks when folding or writing takes the memory of the model, or of a whole file, once more."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the system does not tell the peak of a part of a process")
    paths = os.pathsep.join([str(SOURCE), str(REPOSITORY)])
    # What is let go goes back to the system at once, so that the peak is of what was held.
    at_once = {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=False,
                          env={**os.environ, **at_once, "PYTHONPATH": paths})  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    weights, grown = map(int, done.stdout.split())
    assert weights > 400e6 and grown < 0.15 * weights
