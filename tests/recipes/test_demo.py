"""The demo, small: its two measurements, its line of JSON, its run directory, and what it prints for people."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from luthier.model.files.sources import SEEDLING, resolve_source
from luthier.recipes import demo
from tests.cli.commands import luthier, tree

WEIGHTS = Path(resolve_source(SEEDLING)) / "model.safetensors"
LINE = {"before", "after", "forgetting", "train_seconds", "run"}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A demo of a few rows."""
    for name, value in {"TRAIN_ROWS": 40, "TEST_ROWS": 4, "BASE_DOCUMENTS": 3}.items():
        monkeypatch.setattr(demo, name, value)


@pytest.mark.parametrize(
    "real",
    [False, pytest.param(True, marks=pytest.mark.skipif(not WEIGHTS.is_file(), reason="the seedling has no weights"))],
    ids=["tiny model", "seedling"],
)
def test_the_demo_measures_before_and_after(
    real: bool, short: None, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if not real:
        monkeypatch.setattr(demo, "SEEDLING", str(llama))
    told = luthier("demo", "--json", "--run", tmp_path / "run").must(0, "held-out loss")
    line = told.json
    assert set(line) == LINE and set(line["before"]) == set(line["after"]) == {"exact_match"}
    assert 0 <= line["before"]["exact_match"] <= 1 and line["train_seconds"] > 0
    assert set(line["forgetting"]) == {"before", "after"}
    assert "\x1b" not in told.err
    run = tmp_path / "run"
    assert len((run / "rows.jsonl").read_text("utf-8").splitlines()) == 40
    assert json.loads((run / "summary.json").read_text("utf-8"))["demo"]["after"] == line["after"]
    assert (run / "report.html").is_file() and (run / "adapter").is_dir()
    assert {path.name for path in tmp_path.iterdir()} <= {"run", "model"}
    luthier("eval", run).must(0)
    before = tree(run)
    luthier("demo", "--run", run).must(77, "holds a run (finished); nothing was changed")
    assert tree(run) == before


def test_people_see_a_table_and_the_next_command(
    short: None, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "SEEDLING", str(llama))
    told = luthier("demo", "--quiet").must(0)
    assert told.err == "" and "\x1b" not in told.out
    for part in ("sentence", "before", "after", "exact match", "forgetting", "training", "report", "luthier init mine"):
        assert part in told.out, part
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_the_rows_of_training_and_test_share_no_sentence() -> None:
    train = {row["messages"][0]["content"] for row in demo.demo_rows(200, seed=0, held_out=False)}
    test = {row["messages"][0]["content"] for row in demo.demo_rows(50, seed=1, held_out=True)}
    assert len(test) > 40 and not train & test
