"""The merging benchmark without any process: its recipes, commands, comparison and table."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from luthier.core.knobs import validate
from luthier.recipes.merging.mergekit import translated
from luthier.recipes.merging.recipe import MergeRecipe

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def merge(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("merge")


@pytest.mark.parametrize("method", ["slerp", "linear", "ties"])
def test_the_recipe_is_one_that_luthier_takes(merge: ModuleType, method: str) -> None:
    found, _ = translated(merge.recipe(method, Path("/a"), Path("/b")))
    made = validate(MergeRecipe, found)
    assert made.method.method_name() == method and made.dtype == "bfloat16"
    assert [each.model for each in made.models] == (["/b"] if method == "ties" else ["/a", "/b"])


def test_a_peer_is_measured_only_where_it_is(merge: ModuleType, tmp_path: Path) -> None:
    assert set(merge.commands(tmp_path, tmp_path / "r", tmp_path / "o")) == {"luthier", "luthier, gate"}
    (tmp_path / "venv-mergekit/bin").mkdir(parents=True)
    (tmp_path / "venv-mergekit/bin/mergekit-yaml").write_text("")
    assert len(merge.commands(tmp_path, tmp_path / "r", tmp_path / "o")) == 4


def test_numbers_are_compared_in_steps_of_bfloat16(merge: ModuleType, tmp_path: Path) -> None:
    one = torch.tensor([1.0, -1.0, 0.0, 2.0, -0.0078125, 1e-7]).bfloat16()
    other = torch.tensor([1.0078125, -1.0078125, -0.0, 2.03125, -0.0078125, 2e-7]).bfloat16()
    for name, tensor in (("a", one), ("b", other)):
        (tmp_path / name).mkdir()
        save_file({"w": tensor}, tmp_path / name / "model.safetensors")
    found = merge.apart(tmp_path / "a", tmp_path / "b")
    assert found == {"tensors": 1, "one_step": 2, "cancelled": 1, "more": 1, "missing": 0, "unread": 0}


def test_the_table_has_a_row_for_each_system(merge: ModuleType) -> None:
    line = {"wall_s": 2.0, "sync_s": 0.5, "cpu_s": 3.0, "peak_bytes": 3 * 10**8, "contended": False}
    rows = merge.table([{**line, "system": "luthier"}, {**line, "system": "mergekit", "wall_s": 20.0}])
    assert rows[1][:2] == ["luthier", "2.00 (2.00-2.00)"] and rows[2][2] == "20.50 (20.50-20.50)"
