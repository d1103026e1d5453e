"""What is understood of mergekit's recipes, and that nothing else is passed over."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.core.errors import RecipeError
from luthier.core.knobs import validate
from luthier.recipes.merging.mergekit import translated
from luthier.recipes.merging.recipe import MergeRecipe


def recipe(**values: Any) -> dict[str, Any]:
    models = [{"model": "base"}, {"model": "a", "parameters": {"weight": 0.3, "density": 0.5}},
              {"model": "b", "parameters": {"weight": [0, 1], "density": 0.5}}]  # fmt: skip
    whole = {"merge_method": "ties", "base_model": "base", "models": models, "dtype": "bfloat16", **values}
    return {key: value for key, value in whole.items() if value is not None}


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("ties", {"method": "ties", "density": 0.5}),
        ("dare_ties", {"method": "dare", "density": 0.5, "fuse": "ties"}),
        ("dare_linear", {"method": "dare", "density": 0.5}),
        ("della", {"method": "della", "density": 0.5, "epsilon": 0.15}),
        ("breadcrumbs_ties", {"method": "breadcrumbs", "density": 0.5, "gamma": 0.01, "fuse": "ties"}),
    ],
)
def test_methods_go_by_our_names_and_the_base_stands_apart(name: str, method: dict[str, Any]) -> None:
    """Breaks when a default of mergekit's is lost, or the base is merged as a model."""
    found, _ = translated(recipe(merge_method=name, parameters={"lambda": 0.7, "int8_mask": True}))
    assert found["method"] == {**method, "scale": 0.7} and found["base"] == "base"
    assert [(parent["model"], parent["weight"]) for parent in found["models"]] == [("a", 0.3), ("b", [0, 1])]
    validate(MergeRecipe, found)


def test_a_translated_recipe_is_one_of_ours() -> None:
    """Breaks when a translation has keys that our recipe does not."""
    found, notes = translated(recipe(merge_method="dare_ties", parameters={"normalize": 1.0, "int8_mask": True}))
    made = validate(MergeRecipe, found)
    assert made.method.method_name() == "dare" and made.dtype == "bfloat16"
    assert made.method.as_recipe()["normalize"] is True
    assert "int8_mask is passed over" in notes[0] and "mergekit matches L1 norms" in notes[1]


def test_a_weight_for_all_is_one_of_each_that_has_none_of_its_own() -> None:
    """Breaks when a parameter of the whole recipe overrides that of a model."""
    models = [{"model": "a"}, {"model": "b", "parameters": {"weight": 2.0}}]
    found, _ = translated({"merge_method": "linear", "models": models, "parameters": {"weight": 0.5}})
    assert [parent["weight"] for parent in found["models"]] == [0.5, 2.0]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"chat_template": "auto"}, "the recipe of mergekit has the key 'chat_template'"),
        ({"merge_method": "tise"}, "merge_method is 'tise'.*ties"),
        ({"models": None}, "both there or both missing"),
        ({"parameters": {"filter_wise": True}}, "parameters has 'filter_wise'"),
        ({"tokenizer_source": "model:a"}, "tokenizer_source is 'model:a'"),
        ({"models": [{"model": "a", "layers": 3}]}, "models of mergekit has the key 'layers'"),
        ({"models": [{"model": {"path": "a"}}]}, "a model is"),
        ({"models": ["a"]}, "models has 'a'"),
        ({"models": [{"model": "a", "parameters": {"density": 0.1}}, {"model": "b"}]}, r"density is \[0.1, None\]"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(values: dict[str, Any], said: str) -> None:
    """Breaks when a key that changes the result is read over."""
    with pytest.raises(RecipeError, match=said):
        translated(recipe(**values))
