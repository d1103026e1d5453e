"""The held-out loss of a run, computed anew from its files."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from luthier.recipes.evaluating.evaluate import evaluate_run
from luthier.store.runs import RunDirectory
from tests.cli.commands import luthier


def test_the_held_out_rows_are_those_of_the_run(finished: Path) -> None:
    found = evaluate_run(RunDirectory.open(finished))
    line = luthier("resume", finished, "--json").json
    assert found["rows"] == 8 and found["data"] == "held out"
    assert found["tuned"]["loss"] == pytest.approx(line["loss"]["eval"], abs=1e-6)
    for side in ("base", "tuned"):
        assert found[side]["perplexity"] == pytest.approx(math.exp(found[side]["loss"]))


def test_another_file_is_evaluated_whole(finished: Path, rows: Path) -> None:
    found = luthier("eval", finished, "--data", rows, "--json").must(0).json
    assert found["rows"] == 40 and found["tuned"]["loss"] < found["base"]["loss"]


def test_without_held_out_rows_a_file_is_asked_for(tmp_path: Path, recipe: Path, rows: Path) -> None:
    luthier("train", recipe, "--run", tmp_path / "run", "--set", "evaluation.fraction=0", "--quiet").must(0)
    luthier("eval", tmp_path / "run").must(2, "has no held-out rows", "--data FILE")
    luthier("eval", tmp_path / "run", "--data", rows).must(0)
    luthier("eval", tmp_path / "run", "--data", rows.parent / "row.jsonl").must(65, "did you mean rows.jsonl?")
