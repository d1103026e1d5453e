"""Knobs by layer, role and name: numbers, courses, rules, and what is no setting."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.core.errors import RecipeError
from luthier.merge.settings import Setting, Spot


def at(value: Any, name: str, layers: int = 5) -> float | None:
    return Setting.of(value, "t").at(Spot.of(name, layers))


def test_a_course_is_interpolated_over_the_layers() -> None:
    """Breaks when the last layer does not reach the end, or a course of three is one of two."""
    found = [at([0, 0.5, 1], f"model.layers.{layer}.mlp.up_proj.weight") for layer in range(5)]
    assert found == [0, 0.25, 0.5, 0.75, 1]
    assert [at([0, 1, 0], f"h.{layer}.attn.c_attn.weight", 3) for layer in range(3)] == [0, 1, 0]
    assert at([1, 3], "model.layers.0.mlp.up_proj.weight", 1) == 3


def test_what_lies_outside_of_layers_is_at_the_beginning() -> None:
    """Breaks when a recipe of mergekit's is read otherwise: there head and last norm are at the beginning too."""
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert at([0.2, 0.8], name) == 0.2


def test_the_first_rule_that_fits_holds() -> None:
    """Breaks when a role is searched in names (q would be in every q of them), or rules are tried backwards."""
    rules = [{"filter": "q", "value": 0.1}, {"filter": "self_attn", "value": [0, 1]}, {"value": 0.5}]
    assert at(rules, "model.layers.4.self_attn.q_proj.weight") == 0.1
    assert at(rules, "model.layers.4.self_attn.o_proj.weight") == 1
    assert at(rules, "model.layers.4.mlp.up_proj.weight") == 0.5
    assert at(rules, "model.layers.0.input_layernorm.unique.weight") == 0.5
    assert at([{"filter": "norm", "value": 2}], "model.layers.0.input_layernorm.weight") == 2
    assert at({"filter": "*", "value": 3}, "lm_head.weight") == 3
    assert at(rules[:2], "lm_head.weight") is None


@pytest.mark.parametrize("value", ["half", [], [0, "1"], None, True, float("nan"), [{"filter": 3, "value": 1}],
                                   [{"value": 1, "when": 2}], [[0, 1]]])  # fmt: skip
def test_what_is_no_setting_is_told(value: Any) -> None:
    """Breaks when a word becomes a number, or a key of a rule is passed over."""
    with pytest.raises(RecipeError, match="^t "):
        Setting.of(value, "t")


def test_a_setting_is_written_as_it_was_read() -> None:
    """Breaks when a recipe that is kept with a result says something else."""
    for value in (0.5, [0.0, 1.0], [{"filter": "q", "value": [0.1]}, {"filter": "*", "value": [0.5]}]):
        assert Setting.of(value, "t").plain() == value
