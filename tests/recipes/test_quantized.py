"""Runs on a quantized base: proved as they were trained, opened so again, and refused where the base is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import luthier
from luthier.core.errors import RecipeError
from luthier.model.packed import PackedWeight
from luthier.recipes.opening.opened import open_named
from tests.recipes.test_api import arguments

ROWS = [{"question": f"{number} + {number}?", "answer": str(2 * number)} for number in range(12)]


def test_a_run_on_nf4_is_proved_and_opened_on_nf4(llama: Path, rows: Path, tmp_path: Path) -> None:
    """Breaks when the proof, or whoever opens the result, computes with the weights that were there before."""
    run = luthier.finetune(**arguments(llama, rows), quantizer="nf4", run=tmp_path / "run", quiet=True)
    assert run.summary["status"] == "finished"
    assert run.summary["proof"]["reloaded_loss"] == pytest.approx(run.summary["loss"]["eval"], rel=1e-5)
    kept = json.loads((tmp_path / "run" / "adapter" / "luthier.json").read_text("utf-8"))
    assert kept["quantizer"] == {"method": "nf4", "block": 64, "double": True}
    opened = open_named(str(tmp_path / "run"))
    assert any(isinstance(parameter, PackedWeight) for parameter in opened.model.module.parameters())
    beside = open_named(str(llama), adapter=str(tmp_path / "run" / "adapter"))
    assert any(isinstance(parameter, PackedWeight) for parameter in beside.model.module.parameters())
    assert any("quantizer: nf4" in notice for notice in run.summary["notices"])


def test_a_session_keeps_its_quantizer(tmp_path: Path) -> None:
    """Breaks when a saved session comes back on other weights than it was trained on."""
    session = luthier.load("seedling", quantizer="int8", optimizer=luthier.AdamW(learning_rate=1e-2))
    for _ in range(2):
        session.forward_backward(ROWS)
        session.optim_step()
    loss = session.loss(ROWS)
    folder = session.save(tmp_path / "saved")
    again = luthier.load(folder)
    assert again.quantizer.method_name() == "int8" and again.loss(ROWS) == pytest.approx(loss, rel=1e-5)


def test_training_packed_weights_is_refused_before_anything_is_loaded(rows: Path, tmp_path: Path) -> None:
    """Breaks when full tuning would train codes."""
    with pytest.raises(RecipeError, match="adapter full trains the weights that quantizer nf4"):
        luthier.finetune(model="no-such-model", data=rows, adapter="full", quantizer="nf4", run=tmp_path / "run")
    assert not (tmp_path / "run").exists()
