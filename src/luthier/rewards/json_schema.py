"""JSON schema: whether what was said is JSON that fits a schema.

Idea: the schema is read once and every keyword in it must be one that is checked here; a keyword that would be passed
over in silence is an error. JSON is read strictly: a key twice, NaN and text after the value are no JSON. Numbers and
booleans are told apart, and 1 and 1.0 are one number, as the standard has it.
Equation: 1 if the value fits the schema, else 0; whether it is JSON at all is a part of its own
Source: JSON Schema 2020-12 (json-schema.org), its validation vocabulary without format, contains, dependencies and
unevaluated items. The package jsonschema would bring four others and match an answer against `pattern` without a limit.
Cost: no model; linear in the answer and the schema, but for anyOf and its like, which try each schema.
Use when: answers are read by a program: tool arguments, extraction, labels in JSON.
Not when: generation is held to the schema anyway (a guide): then all of them fit and nothing is learned.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import cache
from typing import Any, Final, final

import regex
from pydantic import Field, model_validator

from luthier.core.errors import DataError, RecipeError
from luthier.data import typed_json
from luthier.data.sample import Sample
from luthier.data.strict_json import Place, parse
from luthier.data.typed_json import Reader
from luthier.rewards import Reward, RewardError, Score, Tools, Verdict

_TYPES: Final[Mapping[str, tuple[type, ...]]] = {
    "object": (dict,), "array": (list,), "string": (str,), "number": (int, float), "boolean": (bool,),
    "null": (type(None),), "integer": (int, float),
}  # fmt: skip
_SAYS_NOTHING: Final = {"$schema", "$id", "$comment", "title", "description", "default", "examples", "deprecated"}
_LIMITS: Final = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_COUNTS: Final = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_MANY: Final = ("allOf", "anyOf", "oneOf", "prefixItems")
_ONE: Final = ("not", "items", "additionalProperties", "propertyNames")
_NAMED: Final = ("properties", "$defs", "definitions", "patternProperties")
_READERS: Final[Mapping[str, Reader[Any]]] = {
    **dict.fromkeys(_LIMITS, typed_json.number), **dict.fromkeys(_COUNTS, typed_json.count),
    **dict.fromkeys(_MANY, typed_json.listed(typed_json.anything)),
    **dict.fromkeys(_NAMED, typed_json.named(typed_json.anything)), "multipleOf": typed_json.positive,
    "enum": typed_json.listed(typed_json.anything), "required": typed_json.listed(typed_json.text, least=0),
    "uniqueItems": typed_json.flag, "pattern": typed_json.text, "$ref": typed_json.text,
}  # fmt: skip
"""What reads the keywords that are no schemas themselves; those in the lists and objects are read one by one."""
_KNOWN: Final = {*_SAYS_NOTHING, *_READERS, *_ONE, "type", "const"}
_SECONDS: Final = 0.5
_DEPTH: Final = 64


@final
class JsonSchema(Reward):
    """Whether answers are JSON that fits a schema."""

    fits: dict[str, Any] = Field(default_factory=dict, description="the schema; empty: any JSON value will do")
    column: str = Field("", description="the column with the schema of a row, as an object or as text")
    fence: bool = Field(False, description="whether the JSON may stand in a fence of three backticks, with ```json")

    @model_validator(mode="after")
    def _read(self) -> JsonSchema:
        if self.fits and self.column:
            raise RecipeError(f"both fits and column ({self.column})", allowed="one of the two")
        check_schema(self.fits)
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,) if self.column else ()

    def check(self, facts: Mapping[str, Any]) -> None:
        if self.column:
            _schema(facts[self.column], self.column)

    def score(self, samples: Sequence[Sample], tools: Tools) -> list[Verdict]:
        return [self._one(sample) for sample in samples]

    def _one(self, sample: Sample) -> Verdict:
        schema = _schema(sample.fact(self.column), self.column) if self.column else self.fits
        text = sample.said
        if self.fence and text.startswith("```") and text.endswith("```") and "\n" in text:
            text = text.partition("\n")[2].removesuffix("```")
        try:
            value = parse(text, Place("answer"))
        except DataError as failure:
            return Score(0.0, {"json": 0.0}, f"no JSON: {failure}", f"this is no JSON: {failure}")
        try:
            told = next(troubles(value, schema, schema), "")
        except TimeoutError:
            took = f"a pattern of the schema was not done with an answer of {len(text):,} characters in {_SECONDS} s"
            return RewardError(took, do="write the pattern without nested repetition").of(sample, again=False)
        return Score(float(not told), {"json": 1.0}, told, told)


def check_schema(schema: object, where: str = "schema", root: object = None) -> None:
    """Raise RecipeError for a schema that is none, or that holds what would not be checked."""
    root = schema if root is None else root
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise RecipeError(f"{where} is {schema!r}", allowed="a JSON schema: an object, true or false")
    if unknown := [key for key in schema if key not in _KNOWN]:
        raise RecipeError(
            f"{where} has the keyword {unknown[0]!r}, which luthier does not check",
            allowed=f"{', '.join(sorted(_KNOWN - _SAYS_NOTHING))}",
        )
    for key, read in _READERS.items():
        if key in schema:
            read(schema[key], f"{where}.{key}")
    if "type" in schema:
        kind = typed_json.one_of(_TYPES)
        kinds = typed_json.listed(kind) if isinstance(schema["type"], list) else kind
        kinds(schema["type"], f"{where}.type")
    for name, part in _schemas_in(schema):
        check_schema(part, f"{where}.{name}", root)
    for pattern in [*([schema["pattern"]] if "pattern" in schema else []), *schema.get("patternProperties", {})]:
        _compiled(pattern)
    if "$ref" in schema:
        _resolved(schema["$ref"], root)


def troubles(value: object, schema: object, root: object, path: str = "$", depth: int = 0) -> Iterator[str]:
    """Everything in which a value does not fit a schema, in words. Raises TimeoutError for a pattern."""
    if depth > _DEPTH:
        # A schema that refers to itself goes as deep as the answer does, and for ever where it says nothing else.
        yield f"{path[:200]} is deeper than the {_DEPTH} schemas that are looked at"
        return
    if not isinstance(schema, Mapping):
        if schema is False:
            yield f"{path} may not be there"
        return
    if "$ref" in schema:
        yield from troubles(value, _resolved(schema["$ref"], root), root, path, depth + 1)
    types = schema.get("type")
    if types is not None and not any(_is(value, name) for name in ([types] if isinstance(types, str) else types)):
        yield f"{path} is {_shown(value)} and not of type {types}"
    if "enum" in schema and not any(_same(value, one) for one in schema["enum"]):
        yield f"{path} is {_shown(value)} and none of {_shown(schema['enum'])}"
    if "const" in schema and not _same(value, schema["const"]):
        yield f"{path} is {_shown(value)} and not {_shown(schema['const'])}"
    yield from _combined(value, schema, root, path, depth)
    if _is(value, "number"):
        yield from _of_number(value, schema, path)
    elif isinstance(value, str):
        yield from _of_string(value, schema, path)
    elif isinstance(value, list):
        yield from _of_list(value, schema, root, path, depth)
    elif isinstance(value, dict):
        yield from _of_object(value, schema, root, path, depth)


def _combined(value: object, schema: Mapping[str, Any], root: object, path: str, depth: int) -> Iterator[str]:
    def fits(part: object) -> bool:
        return next(troubles(value, part, root, path, depth + 1), None) is None

    for part in schema.get("allOf", ()):
        yield from troubles(value, part, root, path, depth + 1)
    if "anyOf" in schema and not any(map(fits, schema["anyOf"])):
        yield f"{path} fits none of anyOf"
    if "oneOf" in schema and (count := sum(map(fits, schema["oneOf"]))) != 1:
        yield f"{path} fits {count} of oneOf and not exactly one"
    if "not" in schema and fits(schema["not"]):
        yield f"{path} fits what it must not"


def _of_number(value: Any, schema: Mapping[str, Any], path: str) -> Iterator[str]:
    found = Fraction(value)
    for name, wrong in (("minimum", found.__lt__), ("maximum", found.__gt__),
                        ("exclusiveMinimum", found.__le__), ("exclusiveMaximum", found.__ge__)):  # fmt: skip
        if name in schema and wrong(Fraction(schema[name])):
            yield f"{path} is {value} beside {name} {schema[name]}"
    # As it is written: 0.3 is a multiple of 0.1, though no float says so.
    if "multipleOf" in schema and (Fraction(repr(value)) / Fraction(repr(schema["multipleOf"]))).denominator != 1:
        yield f"{path} is {value}, no multiple of {schema['multipleOf']}"


def _of_string(value: str, schema: Mapping[str, Any], path: str) -> Iterator[str]:
    yield from _sized(len(value), "Length", "characters", schema, path)
    if "pattern" in schema and not _compiled(schema["pattern"]).search(value, timeout=_SECONDS):
        yield f"{path} does not match {schema['pattern']!r}"


def _of_list(value: list[Any], schema: Mapping[str, Any], root: object, path: str, depth: int) -> Iterator[str]:
    yield from _sized(len(value), "Items", "items", schema, path)
    before = schema.get("prefixItems", [])
    for at, item in enumerate(value):
        part = before[at] if at < len(before) else schema.get("items", True)
        yield from troubles(item, part, root, f"{path}[{at}]", depth + 1)
    if schema.get("uniqueItems") and len({_canonical(item) for item in value}) != len(value):
        yield f"{path} has an item twice"


def _of_object(value: dict[str, Any], schema: Mapping[str, Any], root: object, path: str, depth: int) -> Iterator[str]:
    yield from _sized(len(value), "Properties", "keys", schema, path)
    yield from (f"{path}.{name} is missing" for name in schema.get("required", ()) if name not in value)
    named, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    for name, item in value.items():
        parts = [named[name]] if name in named else []
        parts += [part for pattern, part in patterns.items() if _compiled(pattern).search(name, timeout=_SECONDS)]
        for part in parts or [schema.get("additionalProperties", True)]:
            yield from troubles(item, part, root, f"{path}.{name}", depth + 1)
        if "propertyNames" in schema:
            yield from troubles(name, schema["propertyNames"], root, f"the key {path}.{name}", depth + 1)


def _sized(size: int, kind: str, unit: str, schema: Mapping[str, Any], path: str) -> Iterator[str]:
    if size < schema.get(f"min{kind}", 0):
        yield f"{path} has {size} {unit}, fewer than {schema[f'min{kind}']}"
    if size > schema.get(f"max{kind}", size):
        yield f"{path} has {size} {unit}, more than {schema[f'max{kind}']}"


def _schemas_in(schema: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    for key, value in schema.items():
        if key in _ONE:
            yield key, value
        elif key in _MANY:
            yield from ((f"{key}[{at}]", part) for at, part in enumerate(value))
        elif key in _NAMED:
            yield from ((f"{key}.{name}", part) for name, part in value.items())


def _resolved(reference: object, root: object) -> object:
    found: Any = root
    for name in str(reference).split("/")[1:]:
        name = name.replace("~1", "/").replace("~0", "~")
        found = found.get(name) if isinstance(found, Mapping) else None
    if not str(reference).startswith("#") or found is None:
        raise RecipeError(f"$ref is {reference!r}", allowed="#/$defs/NAME, with NAME in the same schema")
    return found


def _schema(value: object, column: str) -> object:
    """The schema of a row. Raises DataError for what is none: the fault is the row's and not the recipe's."""
    schema = parse(value, Place(column)) if isinstance(value, str) else value
    try:
        check_schema(schema, column)
    except RecipeError as failure:
        raise DataError(failure.received, allowed=failure.allowed) from failure
    return schema


def _is(value: object, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    return isinstance(value, _TYPES[name]) and not (name == "integer" and isinstance(value, float) and value % 1)


def _same(one: object, two: object) -> bool:
    return _canonical(one) == _canonical(two)


def _canonical(value: object) -> str:
    """Equal texts for equal values: 1 and 1.0 are, 1 and true are not."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(key)}:{_canonical(value[key])}" for key in sorted(value)) + "}"
    return "[" + ",".join(map(_canonical, value)) + "]" if isinstance(value, list) else json.dumps(value)


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


@cache
def _compiled(pattern: str) -> Any:
    try:
        return regex.compile(pattern)
    except (regex.error, TypeError) as failure:
        raise RecipeError(f"pattern {pattern!r} is no regular expression: {failure}", allowed="one") from failure
