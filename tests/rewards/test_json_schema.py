"""JSON schema: the same verdicts as an implementation of the standard, and nothing passed over in silence."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.core.chosen import choose
from luthier.core.errors import DataError, RecipeError
from luthier.rewards import Reward
from luthier.rewards.json_schema import JsonSchema, check_schema, troubles
from tests.rewards.samples import failure, sample, score

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "minLength": 1}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
KNOBS: dict[str, Any] = {"fits": PERSON}
GOOD = sample('{"name": "Ada", "age": 36}')
BAD = sample('{"name": "Ada", "age": "36"}')

SCHEMAS: list[Any] = [
    PERSON, True, False, {}, {"type": ["string", "null"]}, {"type": "integer"}, {"type": "number"}, {"const": 1},
    {"const": True}, {"enum": [1, "a", None, [1], {"a": 1}]}, {"minimum": 2}, {"exclusiveMaximum": 2}, {"maximum": 1.5},
    {"multipleOf": 0.5}, {"minLength": 2}, {"maxLength": 1}, {"pattern": "^a+$"}, {"minItems": 1}, {"maxItems": 1},
    {"uniqueItems": True}, {"items": {"type": "integer"}}, {"prefixItems": [{"type": "string"}], "items": False},
    {"minProperties": 2}, {"maxProperties": 0}, {"required": ["a"]}, {"properties": {"a": {"minimum": 1}}},
    {"patternProperties": {"^a": {"type": "string"}}, "additionalProperties": {"type": "null"}},
    {"propertyNames": {"maxLength": 1}}, {"anyOf": [{"type": "string"}, {"minimum": 1}]},
    {"oneOf": [{"type": "integer"}, {"minimum": 1}]}, {"allOf": [{"minimum": 0}, {"maximum": 2}]},
    {"not": {"type": "object"}}, {"$ref": "#/$defs/a", "$defs": {"a": {"type": "integer"}}},
    {"$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}, "$ref": "#/$defs/tree"},
]  # fmt: skip
KEYS = st.sampled_from(["a", "ab", "b", "name", "age"])
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from([0.0, 0.5, 1.0, 1.5, -2.0]),
                   st.text("ab", max_size=3))  # fmt: skip
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3))


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(SCHEMAS), VALUES)
def test_it_says_what_jsonschema_rs_says(schema: Any, value: Any) -> None:
    """Breaks when a keyword is read otherwise than the standard says: 1 and 1.0 are one, 1 and true are not."""
    oracle = pytest.importorskip("jsonschema_rs", reason="jsonschema_rs (it comes with schemathesis) is not installed")
    check_schema(schema)
    assert (next(troubles(value, schema, schema), None) is None) == oracle.is_valid(schema, value)


@pytest.mark.parametrize(
    ("said", "value", "is_json"),
    [
        ('{"name": "Ada", "age": 36}', 1.0, 1.0),
        ('{"name": "Ada", "age": 36.0}', 1.0, 1.0),
        ('<think>{</think>{"name": "Ada", "age": 36}', 1.0, 1.0),
        ('{"name": "Ada", "age": true}', 0.0, 1.0),
        ('{"name": "Ada", "age": 36, "x": 1}', 0.0, 1.0),
        ('{"name": "Ada", "age": -1}', 0.0, 1.0),
        ('{"name": "Ada"}', 0.0, 1.0),
        ('{"name": "Ada", "age": 3, "age": 36}', 0.0, 0.0),
        ('{"name": "Ada", "age": 36} and more', 0.0, 0.0),
        ('```json\n{"name": "Ada", "age": 36}\n```', 0.0, 0.0),
        ('{"name": "Ada", "age": NaN}', 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_answers_are_read_strictly(said: str, value: float, is_json: float) -> None:
    found = score(JsonSchema(fits=PERSON), sample(said))
    assert (found.value, found.parts["json"]) == (value, is_json)


def test_a_fence_is_a_knob_and_a_schema_may_come_from_the_row() -> None:
    fenced = sample('```json\n{"name": "Ada", "age": 36}\n```')
    assert score(JsonSchema(fits=PERSON, fence=True), fenced).value == 1.0
    for schema in (PERSON, json.dumps(PERSON)):
        assert score(JsonSchema(column="schema"), sample(GOOD.answer, schema=schema)).value == 1.0
    with pytest.raises((DataError, RecipeError), match="schema"):
        score(JsonSchema(column="schema"), sample("1", schema={"format": "email"}))


@pytest.mark.parametrize(
    ("schema", "part"),
    [
        ({"format": "email"}, "format"),
        ({"properties": {"a": {"unevaluatedItems": False}}}, "unevaluatedItems"),
        ({"type": "text"}, "text"),
        ({"pattern": "("}, "regular expression"),
        ({"$ref": "http://example.org/a"}, "ref"),
        ({"$ref": "#/$defs/b"}, "ref"),
        ({"anyOf": {}}, "anyOf"),
        ({"items": 1}, "items"),
    ],
)
def test_what_would_not_be_checked_is_refused(schema: Any, part: str) -> None:
    """Breaks when a keyword that nobody reads lets every answer through."""
    with pytest.raises((RecipeError, ValueError), match=part):
        JsonSchema(fits=schema)


@pytest.mark.parametrize(
    ("schema", "received", "allowed"),
    [
        ({"type": 5}, "schema.type is 5", "object, array"),
        ({"type": [["x"]]}, "schema.type[0] is ['x']", "object, array"),
        ({"type": []}, "schema.type is []", "a list of 1 or more"),
        ({"enum": 5}, "schema.enum is 5", "a list of 1 or more"),
        ({"required": "name"}, "schema.required is 'name'", "a list"),
        ({"required": [5]}, "schema.required[0] is 5", "a text"),
        ({"minimum": "0"}, "schema.minimum is '0'", "a number"),
        ({"maximum": float("inf")}, "schema.maximum is inf", "a number"),
        ({"multipleOf": 0}, "schema.multipleOf is 0", "a number above 0"),
        ({"minLength": "3"}, "schema.minLength is '3'", "a whole number"),
        ({"maxItems": -1}, "schema.maxItems is -1", "a whole number"),
        ({"maxItems": 1.5}, "schema.maxItems is 1.5", "a whole number"),
        ({"uniqueItems": "yes"}, "schema.uniqueItems is 'yes'", "true or false"),
        ({"pattern": 5}, "schema.pattern is 5", "a text"),
        ({"$ref": 5}, "schema.$ref is 5", "a text"),
        ({"properties": ["a"]}, "schema.properties is ['a']", "an object"),
        ({"properties": {"a": {"type": 5}}}, "schema.properties.a.type is 5", "object, array"),
        ({"items": {"oneOf": "a"}}, "schema.items.oneOf is 'a'", "a list"),
    ],
)
def test_a_keyword_of_the_wrong_kind_is_refused_by_its_name(schema: Any, received: str, allowed: str) -> None:
    """Breaks when a schema that is none is a traceback, as it is read or when an answer is compared with it."""
    with pytest.raises(RecipeError) as failure:
        choose("rewards", Reward, {"method": "json_schema", "fits": schema})
    text = failure.value.told()
    assert received in text and allowed in text.partition(received)[2], text
    with pytest.raises(DataError, match="form"):
        JsonSchema(column="form").check({"form": schema})


def test_an_answer_that_is_deep_or_a_schema_that_goes_in_circles_ends_nothing() -> None:
    """Breaks when the depth of an answer decides whether the run goes on."""
    tree = {"$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}, "$ref": "#/$defs/tree"}
    assert [score(JsonSchema(fits=tree), sample("[" * n + "]" * n)).value for n in (1, 20, 150)] == [1.0, 1.0, 0.0]
    assert score(JsonSchema(fits={"$ref": "#"}), sample("1")).value == 0.0


def test_a_pattern_that_takes_for_ever_is_no_verdict() -> None:
    form = JsonSchema(fits={"type": "string", "pattern": "^(a|aa)+$"})
    assert not failure(form, sample(json.dumps("a" * 60 + "b"))).again
