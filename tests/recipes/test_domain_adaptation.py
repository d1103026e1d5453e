"""Domain adaptation: stages on each other's weights, a merge at the end, and going on where it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from luthier.core.errors import RecipeError
from luthier.core.knobs import validate
from luthier.recipes.domain_adaptation import FOUND, AdaptationRecipe, stage_recipes
from luthier.store.runs import RunDirectory
from tests.cli.commands import luthier


def recipe(model: object, home: Path, rows: Path, pairs: Path, text: Path, *, steps: int = 2) -> dict[str, object]:
    common = {"optimizer": {"method": "adamw", "learning_rate": 0.003}, "budget": {"steps": steps},
              "batch": {"rows": 4}, "precision": "float32",
              "evaluation": {"fraction": 0.2, "every": 0, "prompts": 0}}  # fmt: skip
    stages = [
        {"name": "cpt", "recipe": {**common, "data": str(text), "objective": {"method": "language_model"},
                                   "adapter": {"method": "full"}}},
        {"name": "sft", "recipe": {**common, "data": str(rows)}},
        {"name": "orpo", "recipe": {**common, "data": str(pairs), "objective": {"method": "orpo"}}},
    ]  # fmt: skip
    return {"recipe": "domain_adaptation", "model": str(model), "stages": stages, "judge": str(rows),
            "run": str(home / "adapted"), "merge": {"method": "slerp", "t": 0.5}, "allow_worse": True}  # fmt: skip


def files(home: Path) -> tuple[Path, Path, Path]:
    rows, pairs, text = (home / name for name in ("rows.jsonl", "pairs.jsonl", "domain.txt"))
    things = ("oars", "nets", "sails", "ropes", "casks", "keels", "masts", "tars")
    facts = [(f"Who makes {thing}?", f"The {thing} guild.") for thing in things]
    rows.write_text("".join(json.dumps({"question": ask, "answer": say}) + "\n" for ask, say in facts))
    told = [{"prompt": ask, "chosen": say, "rejected": "Nobody."} for ask, say in facts]
    pairs.write_text("".join(json.dumps(pair) + "\n" for pair in told))
    text.write_text("\n\n".join(f"In the harbour {say.lower()[:-1]} answers to no one." for _, say in facts * 4))
    return rows, pairs, text


def test_stages_go_on_with_each_others_weights(llama: Path, tmp_path: Path) -> None:
    """Breaks when a stage begins from the base again, or may name a model of its own."""
    values = recipe(llama, tmp_path, *files(tmp_path))
    found = stage_recipes(validate(AdaptationRecipe, values))
    home = tmp_path / "adapted"
    assert [each.model for each in found] == [str(llama), str(home / "1-cpt/model"), str(home / "2-sft-whole")]
    path = tmp_path / "adapt.yaml"
    path.write_text(json.dumps(values))
    told = luthier("train", path, "--dry-run", "--json").must(0).json
    assert [stage["objective"]["method"] for stage in told["stages"]] == ["language_model", "sft", "orpo"]
    values["stages"][1]["recipe"]["model"] = "other"  # type: ignore[index]
    with pytest.raises(RecipeError, match="stage sft names its own model"):
        stage_recipes(validate(AdaptationRecipe, values))


def test_answers_may_judge(llama: Path, tmp_path: Path) -> None:
    """Breaks when stages, parents or result are measured by something else than what was asked for."""
    values = recipe(llama, tmp_path, *files(tmp_path), steps=1)
    stage = {**values["stages"][1]["recipe"], "adapter": {"method": "full"}}  # type: ignore[index]
    path = tmp_path / "adapt.yaml"
    once = {**values, "stages": [{"name": "sft", "recipe": stage}], "judge": f"{values['judge']}#2"}
    path.write_text(json.dumps({**once, "metric": "exact_mash"}))
    luthier("train", path, "--quiet").must(2, "there is no metric 'exact_mash'", "did you mean exact_match")
    assert not (tmp_path / "adapted").exists()
    path.write_text(json.dumps({**once, "metric": "exact_match"}))
    said = luthier("train", path, "--quiet").must(0).out
    assert "sft        exact_match 0.0000" in said and "merged     exact_match 0.0000" in said
    found = json.loads((tmp_path / "adapted" / FOUND).read_text())
    assert found["measure"] == found["merged"]["measure"] == "exact_match"
    # Nothing of the likelihood, which is never zero, is among them.
    assert set(found["scores"].values()) == set(found["merged"]["parents"].values()) == {0.0}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_seedling_is_adapted_and_merged(tmp_path: Path) -> None:
    """Breaks when a stage loses what the one before has learned, or the same command does not go on."""
    values = recipe("seedling", tmp_path, *files(tmp_path), steps=20)
    path = tmp_path / "adapt.yaml"
    path.write_text(json.dumps(values))
    found = luthier("train", path, "--json", "--quiet").must(0).json
    scores = found["scores"]
    assert list(scores) == ["before", "cpt", "sft", "orpo"] and scores["sft"] > scores["before"]
    merged = found["merged"]
    last = str(tmp_path / "adapted/3-orpo-whole")
    assert set(merged["parents"]) == {last, "seedling"} and merged["parents"][last] == pytest.approx(scores["orpo"])
    assert merged["expected"] == pytest.approx((scores["orpo"] + scores["before"]) / 2)
    assert json.loads((tmp_path / "adapted" / FOUND).read_text())["scores"] == scores
    before = RunDirectory.open(tmp_path / "adapted/2-sft").status()
    luthier("train", path, "--json", "--quiet").must(77, "is there already")
    assert RunDirectory.open(tmp_path / "adapted/2-sft").status() == before
