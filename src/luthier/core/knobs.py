"""Knobs: frozen, strict, typed settings, and the methods that own them.

A *method* is one object: its own knobs and its behaviour. Unknown keys are errors that name the nearest known one.
How a recipe's mapping becomes a method is in `chosen.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Final, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from luthier.core.errors import LuthierError, RecipeError
from luthier.core.nearest import did_you_mean


class Knobs(BaseModel):
    """Settings that cannot be changed once made, refuse what they do not know, and convert nothing silently.

    A number that is none, or has no end, is no setting: what is empty says that there is no limit.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False
    )


class Method(Knobs, ABC):
    """A method of a family: its knobs and its behaviour. The file it lives in is its name and holds its card."""

    provides: ClassVar[frozenset[str]] = frozenset()
    requires: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def method_name(cls) -> str:
        """The name a recipe uses: the name of the file."""
        return cls.__module__.rpartition(".")[2]

    def as_recipe(self) -> dict[str, Any]:
        """The method as a recipe writes it."""
        return {"method": self.method_name(), **self.model_dump(mode="json")}


Model = TypeVar("Model", bound=BaseModel)
_MAY: Final = " is not allowed: input should be "


class Chooser(ABC):
    """Annotation of a field that holds one of several kinds; which one, its value says."""

    @abstractmethod
    def kind_of(self, value: Any) -> type[BaseModel]:
        """The kind that a value stands for. Raises RecipeError when it stands for none."""


@dataclass(frozen=True)
class Problem:
    """One key that does not fit: what is said before and after its path, and what to do, if that is known."""

    before: str
    path: tuple[str, ...]
    after: str
    do: str = ""

    def text(self, where: str) -> str:
        """The problem as a sentence; `where` stands before the path."""
        place = ".".join([where] * bool(where) + list(self.path))
        # What is about a whole method begins a sentence of its own.
        gap = ": " if place and self.after[:1] not in ("", ":", " ", ",", ";") else ""
        return self.before + place + gap + self.after


class KnobsError(RecipeError):
    """Values that do not fit their knobs, key by key."""

    problems: tuple[Problem, ...] = ()


def validate(
    kind: type[Model], values: Mapping[str, Any], *, where: str = "", address: Callable[[str], str] | None = None
) -> Model:
    """`kind` made from plain values, with every problem told in the words of the recipe.

    `address` gives the file, line and column of a dotted key. Raises KnobsError, a RecipeError, that lists each
    offending key, what it held, what it may hold, and the nearest known key.
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as failure:
        problems = _of_each_key([problem for error in failure.errors() for problem in _problems(kind, values, error)])
    texts = []
    for problem in problems:
        place = address(".".join(problem.path)) if address else ""
        texts.append((f"{place}: " if place else "") + problem.text(where))
        texts += [problem.do] if problem.do else []
    # What to do about each of them is as good as what to do: nothing general is to follow it.
    do = texts.pop() if all(problem.do for problem in problems) else ""
    error = KnobsError("; ".join(texts), do=do)
    error.problems = problems
    raise error


def _problems(kind: type[BaseModel], values: Mapping[str, Any], error: ErrorDetails) -> list[Problem]:
    path = tuple(map(str, _keys(kind, error["loc"])))
    if error["type"] == "extra_forbidden":
        known, elsewhere = fields_at(kind, error["loc"][:-1]), _places_of(path[-1], kind, values)
        do = f"did you mean {' or '.join(elsewhere)}?" if elsewhere else did_you_mean(path[-1], known)
        return [Problem("unknown key ", path, "", do)]
    if error["type"] == "missing":
        return [Problem("", path, " is missing")]
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, KnobsError):
        return [replace(inner, path=path + inner.path) for inner in cause.problems]
    if isinstance(cause, LuthierError):
        return [Problem("", path, f": {cause.cause()}" if path else cause.cause(), cause.do)]
    # A recipe has mappings; what Python calls them is no help.
    why = f"{error['msg'][:1].lower()}{error['msg'][1:]}".replace("a valid dictionary", "a mapping: {key: value}")
    return [Problem("", path, f": {error['input']!r} is not allowed: {why}")]


def _keys(annotation: object, loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """The keys of a place in what an annotation says, without the names that pydantic gives members of a union."""
    if not loc:
        return ()
    within = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return _keys(within[0], loc)
    if get_origin(annotation) in (Union, UnionType):
        members = [each for each in within if each is not NoneType]
        return _keys(members[0], loc) if len(members) == 1 else loc[1:]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        field = annotation.model_fields.get(str(loc[0]))
        return (loc[0], *_keys(None if field is None else field.annotation, loc[1:]))
    # Of a tuple each item is of the first kind, of a mapping each value of the second.
    items = [each for each in within if each is not Ellipsis]
    return (loc[0], *_keys(items[-1] if items else None, loc[1:]))


def _of_each_key(problems: Sequence[Problem]) -> tuple[Problem, ...]:
    """The problems, with what several members of a union would have taken at one key in one sentence."""
    found: list[Problem] = []
    for problem in problems:
        what, may, allowed = problem.after.partition(_MAY)
        if may and found and found[-1].path == problem.path and found[-1].after.startswith(what + may):
            found[-1] = replace(found[-1], after=f"{found[-1].after}, or {allowed}")
        else:
            found.append(problem)
    return tuple(found)


def _places_of(name: str, kind: type[BaseModel], values: object) -> list[str]:
    """Where a key of this very name stands, in all that is nested, and in the methods that `values` choose."""
    found, written = [], values if isinstance(values, Mapping) else {}
    for key, field in kind.model_fields.items():
        found += [key] if key == name else []
        value = written.get(key, field.get_default(call_default_factory=True))
        inner = _kind_in(field, value)
        found += [f"{key}.{place}" for place in _places_of(name, inner, value)] if inner is not None else []
    return found


def _kind_in(field: FieldInfo, value: object) -> type[BaseModel] | None:
    """The kind of knobs that a field holds when it is given `value`; None where it holds none."""
    for each in field.metadata:
        if isinstance(each, Chooser):
            try:
                return each.kind_of(value)
            except RecipeError:
                return None  # A problem of its own, which is told beside the one that asks.
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def fields_at(kind: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The field names known at `loc`, following nested knobs."""
    for part in loc:
        field = kind.model_fields.get(str(part))
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        kind = annotation
    return list(kind.model_fields)
