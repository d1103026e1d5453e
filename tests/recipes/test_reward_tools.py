"""A reward model and a judge in a run of rollouts: from preferences to a policy, and what is told when one lacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.core.errors import RecipeError
from luthier.core.knobs import validate
from luthier.recipes.schemas.reinforce import ReinforceRecipe
from tests.cli.commands import luthier

WORDS = ("calm", "quiet", "slow", "warm", "blue", "green")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pairs = [
        {"prompt": f"Say {one}{mark}", "chosen": f"{one} it is.", "rejected": f"{one.upper()}!!!"}
        for one in WORDS for mark in ".?"
    ]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)), "utf-8")
    asked = [json.dumps({"prompt": f"Say {one}."}) for one in WORDS]
    (tmp_path / "asked.jsonl").write_text("\n".join(asked), "utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(**changes: Any) -> dict[str, Any]:
    return {
        "model": "seedling", "data": {"train": "asked.jsonl"}, "adapter": {"method": "lora", "rank": 4}, "seed": 1,
        "budget": {"steps": 2}, "evaluation": {"fraction": 0.2}, "precision": "float32", **changes,
    }  # fmt: skip


def test_from_preferences_to_a_reward_model_to_a_policy(here: Path) -> None:
    """Breaks when a learned reward has no model in a run, or the proof scores answers by another one."""
    compared = recipe(data={"train": "pairs.jsonl"}, objective={"method": "reward_model"}, run="rm")
    Path("rm.yaml").write_text(json.dumps(compared), "utf-8")
    luthier("train", "rm.yaml").must(0)
    rolled = recipe(
        recipe="reinforce", objective={"method": "ppo"}, reward={"method": "learned"}, reward_model="rm", run="policy",
        rollouts={"prompts": 2, "answers": 2, "max_new_tokens": 6},
    )  # fmt: skip
    Path("ppo.yaml").write_text(json.dumps(rolled), "utf-8")
    luthier("train", "ppo.yaml").must(0)
    summary = json.loads(Path("policy/summary.json").read_text("utf-8"))
    assert summary["status"] == "finished" and {"reward", "raw", "cut_off"} <= set(summary["metrics"])
    assert summary["proof"]["reloaded_loss"] == pytest.approx(summary["proof"]["eval_loss"], abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"reward": {"method": "learned"}}, "reward_model is empty"), ({"reward": {"method": "judge"}}, "judge is empty"),
     ({"reward": {"method": "length"}, "judge": "seedling"}, "asks none")],
)  # fmt: skip
def test_who_is_asked_is_named_and_nobody_else(here: Path, changes: dict[str, Any], words: str) -> None:
    """Breaks when a run begins whose reward has nobody to ask, or a model is read that nobody asks."""
    with pytest.raises(RecipeError, match=words):
        validate(ReinforceRecipe, recipe(recipe="reinforce", **changes))
