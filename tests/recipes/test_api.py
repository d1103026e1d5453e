"""`luthier.finetune` is `luthier train` as a call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import luthier
from luthier.core.errors import DataError, LuthierError, RecipeError
from tests.cli.commands import STEPS, step_events


def arguments(llama: Path, rows: Path) -> dict[str, Any]:
    return {
        "model": str(llama),
        "data": rows,
        "optimizer": luthier.AdamW(learning_rate=0.01),
        "budget": {"steps": STEPS},
        "batch": {"rows": 8},
        "evaluation": {"fraction": 0.2, "every": 4, "prompts": 1, "max_new_tokens": 4},
        "checkpoint": {"every": 2},
        "precision": "float32",
    }


def test_a_call_gives_the_run_that_the_command_gives(
    tmp_path: Path, llama: Path, rows: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = luthier.LoRA(rank=4, alpha=8.0, dropout=0.1)
    run = luthier.finetune(**arguments(llama, rows), adapter=adapter, run=tmp_path / "run")
    assert step_events(run.path) == step_events(finished)
    assert run.summary["status"] == "finished" and run.path == tmp_path / "run"
    told = capsys.readouterr()
    assert told.out == "" and "step 8/8" in told.err
    answers = run.generate(["the colour of 3 is", "x"], max_new_tokens=4)
    assert len(answers) == 2 and answers == run.generate(["the colour of 3 is", "x"], max_new_tokens=4)


def test_methods_may_be_names_mappings_or_objects(
    tmp_path: Path, llama: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = set()
    for number, adapter in enumerate(("ia3", {"method": "ia3"}, luthier.IA3())):
        given = {**arguments(llama, rows), "budget": {"steps": 1}, "data": [str(rows)]}
        run = luthier.finetune(**given, adapter=adapter, run=tmp_path / str(number), quiet=True)
        losses.add(run.summary["loss"]["eval"])
    assert len(losses) == 1
    assert capsys.readouterr().err == ""


def test_wrong_arguments_are_errors_that_python_knows_and_create_nothing(
    tmp_path: Path, llama: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = arguments(llama, rows)
    with pytest.raises(RecipeError, match="did you mean lora"):
        luthier.finetune(**given, adapter="lorra")
    with pytest.raises(ValueError, match="unknown key budget.stps; did you mean steps"):
        luthier.finetune(**{**given, "budget": {"stps": 3}})
    with pytest.raises(DataError, match="no such file"):
        luthier.finetune(**{**given, "data": rows.parent / "none.jsonl"})
    with pytest.raises(LuthierError) as caught:
        luthier.finetune(**given, run=rows)
    assert caught.value.exit_code == 77
    assert not (tmp_path / "runs").exists()
