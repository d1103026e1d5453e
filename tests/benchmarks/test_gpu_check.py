"""The check of a GPU, without one: its steps can be begun, fit into their time, and are told however they end."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from luthier.recipes.schemas.files import load_recipe
from tests.benchmarks.lines import module

ROOT = Path(__file__).parents[2]


def test_every_step_is_there_and_names_what_exists(tmp_path: Path) -> None:
    """Breaks when a step names a file, a workload or a system that is gone, or gets more time than there is."""
    check, workloads = module("gpu_check"), module("workloads")
    todo = check.steps(tmp_path)
    assert len({step.name for step in todo}) == len(todo)
    assert all(0 < step.limit <= check.SECONDS for step in todo)
    assert sum(step.limit for step in todo[:-1]) <= check.SECONDS, "all but the largest fit whatever happens"
    for step in todo:
        files = [word for word in step.command if word.startswith(str(ROOT)) and word.endswith(".py")]
        assert all(Path(file).is_file() for file in files), files
        if "--workloads" in step.command:
            name = step.command[step.command.index("--workloads") + 1]
            assert workloads.WORKLOADS[name].device == "cuda"
            sft = module("sft")
            words = list(step.command[2:])
            assert sft.parse(words).device == "cuda", "its command line is understood"


def test_the_recipes_of_the_steps_are_valid(tmp_path: Path) -> None:
    """Breaks when a command of a step would be refused before it looks at a device."""
    check = module("gpu_check")
    check.write_rows(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "gpu-rows.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == 32 and all(set(row) == {"text"} for row in rows)
    recipe = tmp_path / "gpu-runs" / "one.yaml"
    recipe.write_text(f"model: seedling\ndata: {tmp_path / 'gpu-rows.jsonl'}\nobjective: language_model\n", "utf-8")
    for step in check.steps(tmp_path):
        words = step.command
        sets = [words[place + 1] for place, word in enumerate(words) if word == "--set"]
        if "train" in words:
            loaded = load_recipe(recipe, overrides=sets).recipe
            assert loaded.device == "cuda" and loaded.budget.steps == 8
            assert loaded.batch.offload == ("both" if "all weights" in step.name else "none")


def test_what_fails_or_takes_too_long_ends_nothing(tmp_path: Path) -> None:
    """Breaks when a step that hangs takes the time of all others, or a failure is not told."""
    check = module("gpu_check")

    def python(program: str, limit: float = 60) -> object:
        return check.Step(program, (sys.executable, "-c", program), limit)

    said: list[str] = []
    todo = [python("print('well')"), python("raise SystemExit(3)"), python("import time; time.sleep(60)", 0.5)]
    found = check.check(todo, 1000, tell=said.append)
    assert [each.code for each in found] == [0, 3, None]
    assert found[0].said == "well\n" and "took longer" in found[2].said
    assert [line.split()[0] for line in said] == ["fine", "FAILED", "FAILED"]
    late = check.check(todo[:1], 5, tell=said.append)
    assert late[0].code is None and late[0].said.startswith("not begun")
    kept = check.evidence(found, [{"system": "luthier"}])
    assert json.loads(json.dumps(kept))["good"] is False and len(kept["steps"]) == 3 and kept["lines"]


def test_without_a_gpu_it_only_tells(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    check = module("gpu_check")
    assert check.main(["--list", "--home", str(tmp_path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(check.steps(tmp_path))
    if not check.torch.cuda.is_available():
        with pytest.raises(SystemExit):
            check.main(["--home", str(tmp_path)])
        assert "there is no GPU here" in capsys.readouterr().err
