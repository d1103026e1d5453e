"""The start-up benchmark without any process: its commands, recipe, texts and table."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def startup(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("startup")


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("startup_tokens")


def test_a_peer_is_measured_only_where_it_is(startup: ModuleType, tmp_path: Path) -> None:
    own = startup.measures(tmp_path, tmp_path, "float32")
    assert set(own) == {
        "luthier --help", "import luthier", "luthier first step", "torch alone", "the libraries alone", "tokens text",
        "tokens chat",
    }  # fmt: skip
    (tmp_path / "venv-trl" / "bin").mkdir(parents=True)
    (tmp_path / "venv-trl" / "bin" / "trl").write_text("")
    both = startup.measures(tmp_path, tmp_path, "float32")
    assert set(both) - set(own) == {"trl sft --help", "trl first step"}
    assert both["trl first step"].warm and both["luthier first step"].warm and not both["tokens text"].warm


def test_luthier_starts_in_an_environment_of_its_own_where_there_is_one(startup: ModuleType, tmp_path: Path) -> None:
    """Breaks when the packages that only tests need are imported in what is measured of luthier, and of no peer."""
    names = ("luthier --help", "import luthier", "luthier first step", "torch alone", "the libraries alone")
    assert {startup.measures(tmp_path, tmp_path, "float32")[name].command[0] for name in names} == {sys.executable}
    (tmp_path / "venv-luthier").mkdir()
    own = startup.measures(tmp_path, tmp_path, "float32")
    assert {own[name].command[0] for name in names} == {str(tmp_path / "venv-luthier" / "bin" / "python")}
    assert own["tokens text"].command[0] == sys.executable


def test_the_recipe_is_one_that_luthier_takes(startup: ModuleType) -> None:
    from luthier.core.knobs import validate
    from luthier.recipes.schemas.finetune import FinetuneRecipe

    recipe = validate(FinetuneRecipe, yaml.safe_load(startup.recipe_text(Path("/bench/sft"), "float32")))
    assert recipe.budget.steps == 1 and recipe.batch.rows == 1 and recipe.evaluation.fraction == 0


def test_the_first_step_is_found_among_the_events(startup: ModuleType, tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    kinds = [("start", 1.0), ("rehearsal", 2.0), ("step", 3.5), ("step", 4.0)]
    events.write_text("".join(json.dumps({"kind": kind, "time": time}) + "\n" for kind, time in kinds))
    assert startup.first_step(events) == 3.5
    events.write_text("")
    with pytest.raises(SystemExit, match="has no step"):
        startup.first_step(events)


def test_the_table_has_medians_ranges_and_the_tokenizer_alone(startup: ModuleType) -> None:
    lines = [
        {"measure": "luthier --help", "wall_s": wall, "cpu_s": 0.1, "contended": wall > 0.2} for wall in (0.3, 0.1, 0.2)
    ]
    lines.append({"measure": "tokens text", "mb_per_s": 8.0, "tokenizer_mb_per_s": 4.0, "cpu_s": 2.0})
    units = {"luthier --help": ("wall_s", "s"), "tokens text": ("mb_per_s", "MB/s a core"), "absent": ("wall_s", "s")}
    rows = startup.table(lines, units)
    assert rows[1] == ["luthier --help", "0.20 (0.10-0.30)", "s", "0.10", "3", "1"]
    assert rows[2][:3] == ["tokens text", "8.00 (8.00-8.00)", "MB/s a core"] and rows[2][-1] == "1"
    assert rows[3][1] == "4.00 (4.00-4.00)" and len(rows) == 4


def test_the_text_of_a_file_is_counted_without_its_keys(tokens: ModuleType, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": [{"role": "user", "content": "é"}], "n": 3}) + "\n", "utf-8")
    assert tokens.text_bytes(rows) == len("user") + 2
    text = tmp_path / "rows.txt"
    text.write_text("two\n", "utf-8")
    assert tokens.text_bytes(text) == 4


def test_rows_are_numbered_so_that_none_is_a_copy(
    tokens: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "LEAST_BYTES", 100)
    prepared, written = tmp_path / "prepared.jsonl", tmp_path / "rows.jsonl"
    prepared.write_text(json.dumps({"prompt": "a", "completion": "b", "input_ids": [1]}) + "\n")
    tokens.write_chat(written, prepared)
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == len(rows) > 5 and set(rows[0]) == {"prompt", "completion"}


def test_the_model_whose_start_is_timed_can_be_prepared(startup: ModuleType) -> None:
    """Breaks when the workloads are renamed and the script finds out only when it runs."""
    assert startup.MODEL in importlib.import_module("workloads").MODELS


def test_the_stages_of_chat_rows_are_those_of_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Breaks when a way from rows to tokens changes and the benchmark of its stages is left behind."""
    from luthier.data.tokenizer import Tokenizer
    from tests.tiny import tiny_tokenizer

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    stages = importlib.import_module("chat_stages")
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{n} and {n}?", "completion": f" {2 * n}"} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = stages.measured(path, "instruction", Tokenizer.of(tiny_tokenizer()))
    assert line["rows"] == line["kept"] == 40 and all(line[name] > 0 for name in stages.STAGES)
