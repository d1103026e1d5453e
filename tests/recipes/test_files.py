"""Recipes as files: layers and origins, the commented template, the run directory of a recipe."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest
import yaml

from luthier.core.knobs import validate
from luthier.recipes.schemas.files import dated, load_recipe, place_of, write_template
from luthier.recipes.schemas.finetune import FinetuneRecipe
from tests.cli.commands import luthier


@pytest.mark.parametrize("adapter", ["lora", "ia3", "prefix_tuning", "full"])
def test_the_template_is_a_recipe_that_says_every_knob(adapter: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    more = ("--model", "x/y", "--data", "my rows.jsonl", "--set", f"adapter.method={adapter}")
    told = luthier("init", path, *more, "--json")
    assert told.must(0).json == {"recipe": str(path)}
    loaded = load_recipe(path)
    assert loaded.recipe.model == "x/y" and loaded.recipe.data.train == "my rows.jsonl"
    assert loaded.recipe.adapter.method_name() == adapter
    text = path.read_text("utf-8")
    for key in FinetuneRecipe.model_fields:
        assert f"\n{key}:" in text or f"\n# {key}:" in text, key
    # The lines that are commented out are the defaults: with their marks gone it is the same recipe.
    lines = [line.replace("# ", "", 1) if is_knob(line) else line for line in text.splitlines()]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert load_recipe(path).recipe == loaded.recipe


def test_the_template_sets_nothing_that_is_a_default() -> None:
    text = write_template(model="seedling", data="rows.jsonl", overrides=["seed=3"])
    lines = text.splitlines()
    written = [line.partition(":")[0] for line in lines if line[:1].isalpha() and not line.endswith(":")]
    assert written == ["model", "seed"]
    # A blank line stands before each key's meaning, and only there.
    names = [(index, line.removeprefix("# ").partition(":")[0]) for index, line in enumerate(lines)]
    heads = [index for index, name in names if name in FinetuneRecipe.model_fields]
    assert [index - 2 for index in heads] == [index for index, line in enumerate(lines) if not line]


def is_knob(line: str) -> bool:
    """Whether a line is a knob that is commented out: one word and a colon."""
    name = line.strip().removeprefix("# ").partition(":")[0]
    return line.lstrip().startswith("# ") and ":" in line and name.replace("_", "").isalnum() and " " not in name


def test_a_run_folder_is_taken_as_it_is_written(tmp_path: Path, recipe: Path) -> None:
    for name in ("2026-11-20", "1", "null", "yes", "a: b", "[x]", "it's #1"):
        loaded = load_recipe(recipe, run=Path(name))
        assert loaded.recipe.run == name
        assert next(origin for key, _, origin in loaded.origins if key == "run") == "--run"


def test_a_run_without_a_name_gets_the_day_the_model_and_the_adapter(
    tmp_path: Path, llama: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = validate(FinetuneRecipe, {"model": str(llama), "data": str(rows), "adapter": "ia3"})
    place = place_of(recipe)
    assert place.parent == Path("runs") and place.name.endswith("-tiny-llama-ia3")
    place.mkdir(parents=True)
    assert place_of(recipe).name == f"{place.name}-2"


def test_what_a_run_writes_down_is_a_recipe(finished: Path, recipe: Path) -> None:
    written = yaml.safe_load((finished / "recipe.yaml").read_text("utf-8"))
    assert written["run"] == str(finished)
    again = load_recipe(finished / "recipe.yaml").recipe
    began = written["data"]["date"]
    assert datetime.date.fromisoformat(began)
    asked = dated(load_recipe(recipe).recipe, began)
    assert again.model_dump(exclude={"run"}) == asked.model_dump(exclude={"run"})
    receipt = json.loads((finished / "environment.json").read_text("utf-8"))
    assert "torch_threads" in json.dumps(receipt)


def test_a_template_refuses_what_a_recipe_refuses() -> None:
    with pytest.raises(ValueError, match="did you mean rank"):
        write_template(model="seedling", data="x", overrides=["adapter.rnk=3"])
