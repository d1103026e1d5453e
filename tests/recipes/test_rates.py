"""Learning rates that are tried: the grid, the budget of a try, what judges it, and which is taken."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml

from luthier.core.knobs import validate
from luthier.recipes.comparing.rates import beyond, chosen, grid, settings_of_try, tried
from luthier.recipes.evaluating.evaluate import held_out_of
from luthier.recipes.finetune import start
from luthier.recipes.progress import Silent
from luthier.recipes.schemas.files import load_recipe
from luthier.recipes.schemas.finetune import FinetuneRecipe


def test_the_grid_lies_around_the_preset() -> None:
    """Breaks when the preset is left out of an odd number of tries, or neighbours are not a factor of five apart."""
    assert grid(1e-3, 1) == [1e-3] and grid(1e-3, 3) == [2e-4, 1e-3, 5e-3]
    assert grid(2e-4, 2) == [pytest.approx(2e-4 / 5**0.5, rel=1e-2), pytest.approx(2e-4 * 5**0.5, rel=1e-2)]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ({}, {"epochs": 0.75}),
        ({"epochs": 2.0}, {"epochs": 0.5}),
        ({"steps": 10}, {"steps": 2}),
        ({"steps": 1}, {"steps": 1}),
        ({"steps": 8, "epochs": 1.0, "minutes": 4.0}, {"steps": 2, "epochs": 0.25, "minutes": 1.0}),
    ],
)
def test_a_try_has_its_share_of_the_budget(
    tmp_path: Path, budget: dict[str, float], expected: dict[str, float]
) -> None:
    """Breaks when a limit is not scaled, or one that is not there appears."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": "seedling", "data": "rows.jsonl", "budget": budget}), "utf-8")
    recipe = load_recipe(path).recipe
    changed = load_recipe(path, overrides=settings_of_try(recipe, 0.01, 0.25)).recipe
    assert changed.budget.model_dump(exclude_none=True) == expected
    assert changed.optimizer.peak_learning_rate == 0.01


def test_a_try_is_judged_by_rows_that_are_not_reported(tmp_path: Path) -> None:
    """Breaks when the rows of the result choose the rate, drawn or in a file of their own, or are trained on."""
    rows, other = tmp_path / "rows.jsonl", tmp_path / "other.jsonl"
    rows.write_text("".join(json.dumps({"question": f"q {n}", "answer": f"a {n}"}) + "\n" for n in range(40)), "utf-8")
    other.write_text(json.dumps({"question": "other", "answer": "other"}) + "\n", "utf-8")
    path = tmp_path / "recipe.yaml"
    values = {"model": "seedling", "data": {"train": str(rows)}, "evaluation": {"fraction": 0.2}}
    path.write_text(yaml.safe_dump(values), "utf-8")

    def parts(*sets: str) -> tuple[set[int], set[int]]:
        recipe = load_recipe(path, overrides=sets).recipe
        prepared, _ = held_out_of(recipe)
        train, held = (set(prepared.store.rows[part.indices].tolist()) for part in (prepared.train, prepared.held_out))
        return train, held

    drawn = settings_of_try(load_recipe(path).recipe, 0.01, 0.25)
    (trained, judged), (_, reported) = parts(*drawn), parts()
    assert len(reported) == 8 and len(judged) == 6 and not (trained | judged) & reported
    named = f"data.evaluation={other}"
    trained, judged = parts(named, *settings_of_try(load_recipe(path, overrides=[named]).recipe, 0.01, 0.25))
    assert trained | judged == set(range(40)) and len(judged) == 8


def test_a_try_is_the_run_it_stands_for(tmp_path: Path) -> None:
    """Breaks when a try trains in another way than a run, or leaves something behind."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"q {n}", "answer": f"a {n}"}) + "\n" for n in range(12)), "utf-8")
    values = {
        "model": "seedling",
        "data": str(rows),
        "adapter": {"method": "ia3"},
        "budget": {"steps": 3},
        "batch": {"rows": 4},
        "evaluation": {"fraction": 0.25, "prompts": 0},
        "run": str(tmp_path / "run"),
    }
    recipe = validate(FinetuneRecipe, values)
    found = tried(recipe, recorder=Silent())
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    assert found["steps"] == 3 and found["seconds"] > 0 and found["flops"] > 0
    assert found["loss"] == start(recipe, recorder=Silent()).summary["loss"]["eval"]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [([3.0, 2.0, 1.0], 2.5e-2), ([1.0, 2.0, 3.0], 4e-5), ([3.0, 1.0, 2.0], None), (["NaN", 1.0, "NaN"], None),
     (["NaN"] * 3, None), ([2.0, 1.0, "NaN"], None)],
)  # fmt: skip
def test_the_grid_grows_where_its_best_is_its_last(losses: list[object], expected: float | None) -> None:
    """Breaks when a preset that is far off stays the choice, or a grid grows on the wrong side or for ever."""
    assert beyond([2e-4, 1e-3, 5e-3], [{"loss": loss} for loss in losses]) == expected
    assert beyond([2e-4, 1e-3, 5e-3, 4e-5], [{"loss": loss} for loss in (2.0, 3.0, 4.0, 5.0)]) is None


def test_the_least_loss_is_taken_and_failures_are_not() -> None:
    """Breaks when a rate whose loss is not finite or whose process failed is taken, or its cost is forgotten."""
    found = [{"loss": 2.0, "seconds": 1.0, "flops": 5.0}, {"loss": 1.0, "seconds": 2.0, "flops": 6.0}, {"error": "bad"}]
    search = chosen([0.1, 0.2, 0.3], found, share=0.5)
    assert search["taken"] == 0.2 and not search["at_edge"] and search["losses"] == [2.0, 1.0, math.inf]
    assert search["seconds"] == 3.0 and search["flops"] == 11.0 and search["errors"] == ["bad"]
    assert chosen([0.1, 0.2, 0.3], [{"loss": 1.0}, {"loss": 2.0}, {"loss": "NaN"}], share=0.5)["at_edge"]
    assert chosen([0.1], [{"loss": "NaN"}], share=0.5)["taken"] is None
