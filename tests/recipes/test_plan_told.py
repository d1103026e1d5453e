"""What a plan says of what it cannot plan, or of what `train` would refuse or tell."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier.recipes.planning.asked import asked
from luthier.recipes.planning.fits import advice
from luthier.recipes.planning.plan import PlanKnobs, lay
from tests.arithmetic.published import config as published
from tests.cli.commands import luthier

PathOf = Callable[[str], Path]


@pytest.fixture
def eight(tmp_path: Path) -> Path:
    """The config of an 8B model."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(published("Llama-3.1-8B") | {"max_position_embeddings": 131072}), encoding="utf-8")
    return path


def knobs(method: str, memory: float, **more: Any) -> PlanKnobs:
    return asked(method, ["device=cuda"], memory).model_copy(update=more)


def test_a_model_in_the_place_of_a_recipe_is_told_as_one(tiny_path: PathOf, tmp_path: Path) -> None:
    """Breaks when a config is read as a recipe with keys that nobody knows."""
    model = tiny_path("llama")
    for place in (model, model / "config.json"):
        luthier("plan", place).must(2, f"{place} is a model, and no recipe; luthier plan --model-config {place}")
    (tmp_path / "recipe.json").write_text("{", "utf-8")
    assert "is a model" not in luthier("plan", tmp_path / "recipe.json").must(2).err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("recipe: domain_adaptation\nmodel: seedling\n", "trains in stages"),
        ("recipe: ai_feedback\nmodel: seedling\ndata: rows.jsonl\njudge: seedling\n", "that are judged first"),
        ("model: seedling\nadapters: {a: {data: rows.jsonl}}\n", "trains several adapters"),
    ],
)
def test_a_recipe_of_more_than_a_run_is_not_planned_as_one(tmp_path: Path, text: str, said: str) -> None:
    """Breaks when the plan of one stage, or a complaint about keys that are right, stands for all of it."""
    (file := tmp_path / "recipe.yaml").write_text(text, "utf-8")
    luthier("plan", file).must(2, said, f"luthier train {file} --dry-run")


def test_a_plan_says_what_the_run_would(tmp_path: Path, recipe: Path) -> None:
    """Breaks when rows are cut, or a key is read as another, and only `train` says so."""
    (file := tmp_path / "recipe.yaml").write_text(recipe.read_text("utf-8") + "max_seq_length: 16\n", "utf-8")
    sets = ("--set", "data.over_length=truncate")
    planned = luthier("train", file, "--dry-run", "--json", *sets).must(0).json["plan"]
    dry, cut = planned["notices"], planned["data"]["rendered"]
    said = luthier("plan", file, *sets).must(0).out
    assert cut["truncated"] and f"rows       {cut['truncated']} truncated, 0 dropped" in said
    assert "note       " in said and "max_seq_length is read as data.max_tokens" in said
    assert all(f"note       {notice}" in said for notice in dry)
    assert luthier("plan", file, "--json", *sets).must(0).json["notices"][1:] == dry


def test_texts_that_a_model_has_no_positions_for_are_told(eight: Path) -> None:
    """Breaks when a plan promises what `train` refuses."""
    words = ("plan", "--model-config", eight, "--device", "cuda", "--sequence", 131_073)
    told = "rows of 131,073 tokens are longer than the model's 131,072 positions: luthier train refuses them"
    assert told in luthier(*words).must(0).out and luthier(*words, "--json").must(0).json["notices"] == [told]
    assert luthier(*words[:-1], 131_072, "--json").must(0).json["notices"] == []
    answering = ("plan", "--model-config", eight, "--inference", "--context")
    assert "texts of 131,073 tokens are longer" in luthier(*answering, 131_073).must(0).out
    assert "note" not in luthier(*answering, 131_072).must(0).out


def test_a_rate_alone_makes_no_time_and_that_is_said(eight: Path) -> None:
    """Breaks when one of two options that need each other is read by nobody."""
    words = ("plan", "--model-config", eight, "--inference", "--tflops", 400)
    assert "unknown: name the rates of the device with --tflops and --bandwidth" in luthier(*words).must(0).out
    assert "time       at least" in luthier(*words, "--bandwidth", 3350).must(0).out
    slow = luthier("plan", "--model-config", eight, "--device", "cuda", "--tflops", 0.01).must(0).out
    assert "at least 53 min 30 s" in slow and "e+" not in slow


def test_devices_that_are_there_are_all_asked_to_divide(eight: Path) -> None:
    """Breaks when somebody with eight devices is advised to use fewer."""
    for count, advised in ((1, 4), (8, 8)):
        found = advice(eight, lay(eight, knobs("full", 80e9, batch=1, devices=count)))
        assert [f"devices={advised}", "sharding=fsdp"] in [each["set"] for each in found]

