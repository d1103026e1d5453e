"""Recipes as written: YAML with places, layers, origins, other tools' names."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from luthier.core.errors import RecipeError
from luthier.core.knobs import Knobs
from luthier.core.recipe_file import (
    Layered,
    environment_layer,
    merge,
    origins_table,
    plain_layer,
    read_layer,
    read_layers,
    set_layer,
    text_layer,
    validated,
)
from luthier.core.yaml_text import parse, parse_value

RECIPE = """\
model: seedling            # a comment
data: {train: rows.jsonl, max_tokens: 512}
adapter:
  method: lora
  rank: 16
optimizer: {method: adamw, learning_rate: 2e-4}
"""


def layered(text: str = RECIPE, *, sets: tuple[str, ...] = (), environ: dict[str, str] | None = None) -> Layered:
    return merge([text_layer(text, name="r.yaml"), environment_layer(environ or {}), set_layer(sets)])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4), ("2.0e-4", 2e-4), ("1E3", 1000.0), (".5", 0.5), ("-1.", -1.0), ("7", 7), ("8_192", 8192),
        ("0x10", 16), ("010", 10), ("true", True), ("no", "no"), ("on", "on"), ("null", None), ("~", None), ("", None),
        ("1:30", "1:30"), ("2026-11-20", "2026-11-20"), ("'5'", "5"), ("[1, a]", [1, "a"]), ("{a: 1}", {"a": 1}),
        ("1.2.3", "1.2.3"), ("e5", "e5"), ("- x", ["x"]), (".inf", float("inf")), ("_1", "_1"), ("=", "="),
    ],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    found = parse_value(text, name="x")
    assert found == value
    assert type(found) is type(value)


def test_every_key_has_its_place() -> None:
    positions = parse(RECIPE, name="r.yaml").positions
    at = {".".join(path): (position.line, position.column) for path, position in positions.items()}
    assert at["model"] == (1, 1)
    assert at["data.max_tokens"] == (2, 27)
    assert at["adapter.rank"] == (5, 3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3", "x.yaml:3:1: a stands twice, first in line 1"),
        ("a: {b: 1, b: 2}", "x.yaml:1:11: b stands twice"),
        ("a: !!python/object/apply:os.system [ls]", "x.yaml:1:4: the tag !!python/object"),
        ("a: !env HOME", "the tag !env"),
        ("a: &x {b: 1}\nc: {<<: *x}", "x.yaml:2:5: a merge key"),
        ("a: [1, 2", "x.yaml:1:9: not valid YAML"),
        ("a: b: c", "x.yaml:1:5: not valid YAML"),
        ("? [a]\n: 1", "a key that is itself a list"),
        ("a: *nothing", "not valid YAML"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("a: &x [*x]", "too many values"),
        ("a: !!int x", "'x' is no int"),
        ("[" * 5000, "nested too deeply"),
        ("x: " + "y" * 300_000, "300,003 characters"),
        ("a: \x00", "not valid YAML"),
    ],
)
def test_bad_yaml_is_refused_with_its_place(text: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text, name="x.yaml")
    assert words in str(caught.value)


def test_billion_laughs_are_refused_at_once() -> None:
    lines = ["a0: &a0 [lol]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    with pytest.raises(RecipeError, match="too many"):
        parse("\n".join(lines), name="x")


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1, max_size=4), inner, max_size=3),
    max_leaves=8,
))  # fmt: skip
def test_what_json_writes_is_read_back(value: Any) -> None:
    text = json.dumps(value)
    if "<<" not in text and "Infinity" not in text:
        assert parse_value(text, name="x") == value


@given(st.text(max_size=40))
def test_any_text_parses_or_is_a_recipe_error(text: str) -> None:
    with suppress(RecipeError):
        parse(text, name="x")


def test_layers_later_ones_win_and_leave_their_origin() -> None:
    found = layered(
        sets=("adapter.rank=32", "seed=1", "seed=2"),
        environ={"LUTHIER_SET__ADAPTER__RANK": "8", "LUTHIER_SET__BUDGET__STEPS": "5", "LUTHIER_HOME": "/x"},
    )
    assert found.values["adapter"] == {"method": "lora", "rank": 32}
    assert found.values["seed"] == 2
    assert found.origins == {
        "model": "r.yaml:1", "data.train": "r.yaml:2", "data.max_tokens": "r.yaml:2",
        "adapter.method": "r.yaml:4", "adapter.rank": "--set", "optimizer.method": "r.yaml:6",
        "optimizer.learning_rate": "r.yaml:6", "budget.steps": "LUTHIER_SET__BUDGET__STEPS", "seed": "--set",
    }  # fmt: skip
    assert found.notes == ()


def test_another_method_drops_the_knobs_of_the_old_one_and_says_so() -> None:
    found = layered(sets=("adapter.targets=[q]", "adapter.method=ia3"))
    assert found.values["adapter"] == {"method": "ia3", "targets": ["q"]}
    assert found.notes == ("--set: adapter is ia3; dropped of lora: rank=16",)
    assert "adapter.rank" not in found.origins
    assert layered(sets=("adapter=ia3",)).values["adapter"] == {"method": "ia3"}
    assert layered(sets=("adapter=lora",)).values["adapter"] == {"method": "lora", "rank": 16}
    assert layered(sets=("adapter=null",)).values["adapter"] is None


def test_a_bare_value_opens_up_when_something_is_added() -> None:
    found = layered("adapter: lora\ndata: [a.jsonl, b.jsonl]\n", sets=("adapter.rank=4", "data.max_tokens=64"))
    assert found.values["adapter"] == {"method": "lora", "rank": 4}
    assert found.values["data"] == {"train": ["a.jsonl", "b.jsonl"], "max_tokens": 64}
    assert found.origins["adapter.method"] == "r.yaml:1"
    assert layered(sets=("data=other.jsonl",)).values["data"] == {"train": "other.jsonl", "max_tokens": 512}
    # Only where a bare value stands for something: elsewhere it replaces.
    assert layered("data: {columns: {prompt: q}}", sets=("data.columns=x",)).values["data"] == {"columns": "x"}


def test_defaults_make_a_method_extendable() -> None:
    found = read_layers(None, sets=["adapter.rank=4"], defaults={"adapter": {"method": "lora"}})
    assert found.values == {"adapter": {"method": "lora", "rank": 4}}
    assert found.origins == {"adapter.method": "default", "adapter.rank": "--set"}


def test_a_preset_stands_between_defaults_and_file(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("seed: 2\n")
    preset = plain_layer({"seed": 1, "budget": {"steps": 3}}, origin="preset quick")
    found = read_layers(file, preset=preset, defaults={"seed": 0, "device": "auto"})
    assert found.values == {"seed": 2, "device": "auto", "budget": {"steps": 3}}
    assert found.origins == {"seed": f"{file}:1", "device": "default", "budget.steps": "preset quick"}


def test_names_of_other_tools_are_understood_with_a_note() -> None:
    found = layered("adapter: lora\nlora_r: 8\ncutoff_len: 256\n", sets=("lora_alpha=4",))
    assert found.values == {"adapter": {"method": "lora", "rank": 8, "alpha": 4}, "data": {"max_tokens": 256}}
    assert found.origins["adapter.rank"] == "r.yaml:2"
    assert found.notes == (
        "r.yaml:2: lora_r is read as adapter.rank",
        "r.yaml:3: cutoff_len is read as data.max_tokens",
        "--set: lora_alpha is read as adapter.alpha",
    )
    with pytest.raises(RecipeError, match="lora_rank and lora_r both mean adapter.rank"):
        layered("lora_r: 8\nlora_rank: 8\n")
    assert merge([set_layer(["max_steps=3"], known={"max_steps"})]).values == {"max_steps": 3}


def test_an_alias_and_our_own_nested_key_in_one_file_are_two_values_for_one_knob() -> None:
    with pytest.raises(RecipeError, match="both mean adapter.rank"):
        layered("adapter: {method: lora, rank: 4}\nlora_r: 8\n")


@pytest.mark.parametrize("assignment", ["adapter.rank", "=3", "a..b=3", ".a=1", "a={"])
def test_a_bad_assignment_is_named(assignment: str) -> None:
    with pytest.raises(RecipeError, match="--set"):
        set_layer([assignment])


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"there is no recipe .*luthier init"):
        read_layer(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read"):
        read_layer(tmp_path / "bytes.yaml")
    with pytest.raises(RecipeError, match="a recipe that is a list"):
        text_layer("[1]", name="x")
    assert text_layer("# nothing\n", name="x").values == {}


class Inner(Knobs):
    max_tokens: int | None = Field(None, ge=8, description="longest row")


class Outer(Knobs):
    seed: int = Field(0, description="seed")
    data: Inner = Field(default_factory=Inner, description="rows")


def test_errors_of_the_schema_name_line_and_column() -> None:
    wrong = layered("seed: x\ndata:\n  max_token: 3\n")
    with pytest.raises(RecipeError) as caught:
        validated(Outer, wrong)
    assert "r.yaml:1:1: seed: 'x' is not allowed" in str(caught.value)
    assert "r.yaml:3:3: unknown key data.max_token; did you mean max_tokens?" in str(caught.value)
    with pytest.raises(RecipeError, match="--set: data.max_tokens: 3 is not allowed"):
        validated(Outer, layered("seed: 1\n", sets=("data.max_tokens=3",)))


def test_the_table_of_origins_covers_every_leaf() -> None:
    found = layered("data: {max_tokens: 64}\n")
    assert origins_table(validated(Outer, found).model_dump(), found) == [
        ("seed", 0, "default"),
        ("data.max_tokens", 64, "r.yaml:1"),
    ]
    short = layered("adapter: lora\n")
    dump = {"adapter": {"method": "lora", "rank": 16}}
    assert origins_table(dump, short) == [("adapter.method", "lora", "r.yaml:1"), ("adapter.rank", 16, "default")]
