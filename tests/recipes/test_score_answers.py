"""Scoring answers that are there already: each row its value and why; what cannot be scored is no 0."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.core.errors import DataError, RecipeError
from luthier.core.knobs import validate
from luthier.recipes.evaluating.score_answers import score_answers
from luthier.recipes.schemas.finetune import FinetuneRecipe
from luthier.recipes.schemas.reinforce import ReinforceRecipe
from tests.cli.commands import luthier

ROWS = [
    {"prompt": "What is 2 + 2?", "answer": "4", "completion": "#### 4"},
    {"prompt": [{"role": "user", "content": "What is 2 + 3?"}], "answer": "5", "completion": "#### 4"},
]
RECIPE = {"recipe": "reinforce", "model": "seedling", "data": "rows.jsonl", "reward": {"method": "numeric"}}


def written(folder: Path, rows: list[dict[str, Any]]) -> Path:
    file = folder / "answers.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_each_answer_has_its_score_and_a_reason(tmp_path: Path) -> None:
    found = score_answers(validate(ReinforceRecipe, RECIPE), written(tmp_path, ROWS))
    assert [each["value"] for each in found["answers"]] == [1.0, 0.0] and found["means"]["reward"] == 0.5
    assert found["answers"][1]["reason"] and found["reward"] == "numeric" and found["counts"]["samples"] == 2


def test_an_answer_that_cannot_be_scored_is_no_zero(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "def own(completions, answer, **more):\n"
        "    if '4' in answer:\n        raise ValueError('no')\n    return [None for _ in completions]\n"
    )
    reward = {"method": "function", "path": f"{tmp_path}/own.py:own", "least": 0, "most": 1}
    found = score_answers(validate(ReinforceRecipe, {**RECIPE, "reward": reward}), written(tmp_path, ROWS))
    first, second = found["answers"]
    assert first["value"] is second["value"] is None and found["means"] == {}
    assert "no" in first["reason"] and second["reason"] == "the reward does not apply"


SPY = (
    "import json\n\n\n"
    "def spy(prompts, completions, **more):\n"
    "    with open({log!r}, 'a') as log:\n"
    "        for pair in zip(prompts, completions):\n            log.write(json.dumps(pair) + chr(10))\n"
    "    return [float(len(said)) for said in completions]\n"
)


def spied(folder: Path, reward: str, rows: list[dict[str, Any]]) -> list[Any]:
    """What a function got of these rows: prompts with completions. `reward` has FUNCTION where it is to stand."""
    log = folder / "log.jsonl"
    log.unlink(missing_ok=True)
    (folder / "spy.py").write_text(SPY.format(log=str(log)))
    recipe = json.loads(json.dumps({**RECIPE, "reward": "REWARD"}).replace('"REWARD"', reward))
    function = {"method": "function", "path": f"{folder}/spy.py:spy"}
    recipe = json.loads(json.dumps(recipe).replace('"FUNCTION"', json.dumps(function)))
    (folder / "spied.yaml").write_text(json.dumps(recipe))
    luthier("reward", str(folder / "spied.yaml"), str(written(folder, rows))).must(0)
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_a_function_gets_texts_for_texts_and_messages_for_messages(tmp_path: Path) -> None:
    """Breaks when a function for TRL counts messages where TRL gives it the letters of a text."""
    question = [{"role": "user", "content": "What is 2 + 3?"}]
    messages = [question, [{"role": "assistant", "content": "#### 4"}]]
    assert spied(tmp_path, '"FUNCTION"', ROWS) == [["What is 2 + 2?", "#### 4"], messages]
    # In an exchange all is messages, and so it is where its reward is tried.
    [[prompt, said], _] = spied(tmp_path, '{"method": "calculator", "reward": "FUNCTION"}', ROWS)
    assert prompt == [{"role": "user", "content": "What is 2 + 2?"}] and said == messages[1]


def test_wrong_files_and_recipes_are_told(tmp_path: Path) -> None:
    recipe = validate(ReinforceRecipe, RECIPE)
    for rows, part in (([], "no row"), ([{"prompt": "x", "answer": "4"}], "--column"),
                       ([{**ROWS[0], "prompt": 3}], "prompt is 3")):  # fmt: skip
        with pytest.raises(DataError, match=part):
            score_answers(recipe, written(tmp_path, rows))
    with pytest.raises(RecipeError, match="column 'answer'"):
        score_answers(recipe, written(tmp_path, [{"prompt": "x", "completion": "4"}]))
    with pytest.raises(RecipeError, match="no reward"):
        score_answers(validate(FinetuneRecipe, {"model": "seedling", "data": "x.jsonl"}), written(tmp_path, ROWS))


def test_the_command_tells_it_in_words_and_as_json(tmp_path: Path) -> None:
    file, recipe = written(tmp_path, ROWS), tmp_path / "sums.yaml"
    recipe.write_text(json.dumps(RECIPE))
    said = luthier("reward", str(recipe), str(file)).must(0).out
    assert "numeric, from 0 to 1" in said and "row 2      0.0000  " in said
    assert "reward                       0.5000" in said
    told = json.loads(luthier("reward", str(recipe), str(file), "--json").must(0).out)
    assert told["answers"][0]["value"] == 1.0
    kernels = tmp_path / "kernels.jsonl"
    assert "would write" in luthier("data", "kernels", str(kernels), "--dry-run").must(0).out and not kernels.exists()
    assert json.loads(luthier("data", "kernels", str(kernels), "--json").must(0).out)["rows"] == 14
    assert "is not overwritten" in luthier("data", "kernels", str(kernels)).err
