"""Knobs that differ from tensor to tensor: a number, a course over the layers, or either of them by role and name.

Idea: a recipe writes `t: 0.5`, `t: [0, 0.5, 1]` (interpolated from the first layer to the last), or a list of rules, of
which the first that fits a tensor holds: `t: [{filter: self_attn, value: [0, 1]}, {value: 0.5}]`. A filter is a role
(q, k, v, o, gate, up, down, norm, embed, head) or a part of the tensor's name. What lies outside of layers, before them
or behind, takes the beginning of the course; in a stack the course runs through each slice.
Source: the parameters of mergekit's recipes, which people have, and its rules for both; roles are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, final

from luthier.core.errors import RecipeError
from luthier.model.editing.role_names import layer_of, tensor_roles

_ROLES: Final = frozenset({"q", "k", "v", "o", "gate", "up", "down", "norm", "embed", "head", "table", "linear"})
_FORMS: Final = "a number, a list of numbers over the layers, or a list of {filter: ROLE OR NAME, value: ...}"


@final
@dataclass(frozen=True, slots=True)
class Spot:
    """A tensor of the merged model, and how far through its layers it lies, from 0 to 1."""

    name: str
    depth: float

    @classmethod
    def of(cls, name: str, layers: int, *, layer: int | None = None) -> Spot:
        """Where a tensor lies among so many layers; `layer` is its place among them, where its name says another."""
        own = layer_of(name) if layer is None else layer
        if own is None:
            return cls(name, 0.0)
        return cls(name, own / (layers - 1) if layers > 1 else 1.0)

    def fits(self, rule: str) -> bool:
        """Whether a filter means this tensor."""
        if rule in ("", "*"):
            return True
        return rule in tensor_roles(self.name) if rule in _ROLES else rule in self.name


@final
@dataclass(frozen=True, slots=True)
class Setting:
    """Rules in their order: what each filters, and its course over the layers."""

    rules: tuple[tuple[str, tuple[float, ...]], ...]

    @classmethod
    def of(cls, value: Any, key: str) -> Setting:
        """A setting as a recipe writes it. Raises RecipeError for another form."""
        if isinstance(value, Setting):
            return value
        if isinstance(value, Mapping):
            value = [value]
        if isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
            return cls(tuple(_rule(each, key) for each in value))
        return cls((("", _course(value, key)),))

    def at(self, spot: Spot) -> float | None:
        """The number for a tensor; None where no rule fits it."""
        course = next((course for rule, course in self.rules if spot.fits(rule)), None)
        if course is None:
            return None
        place = spot.depth * (len(course) - 1)
        before = min(int(place), len(course) - 1)
        after = min(before + 1, len(course) - 1)
        return course[before] + (place - before) * (course[after] - course[before])

    def plain(self) -> Any:
        """As a recipe writes it."""
        if len(self.rules) == 1 and not self.rules[0][0]:
            course = self.rules[0][1]
            return course[0] if len(course) == 1 else list(course)
        return [{"filter": rule or "*", "value": list(course)} for rule, course in self.rules]


def _rule(value: Mapping[Any, Any], key: str) -> tuple[str, tuple[float, ...]]:
    if unknown := sorted(set(map(str, value)) - {"filter", "value"}):
        raise RecipeError(f"{key} has a rule with the key {unknown[0]}", allowed="filter and value")
    rule = value.get("filter") or ""
    if not isinstance(rule, str):
        raise RecipeError(f"{key} has the filter {rule!r}", allowed="a role or a part of a tensor's name")
    return rule, _course(value.get("value"), key)


def _course(value: Any, key: str) -> tuple[float, ...]:
    numbers = value if isinstance(value, (list, tuple)) else [value]
    if not numbers or not all(type(each) in (int, float) and math.isfinite(each) for each in numbers):
        raise RecipeError(f"{key} is {value!r}", allowed=_FORMS)
    return tuple(float(each) for each in numbers)
