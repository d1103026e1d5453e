"""Typed JSON: the values of free JSON in a recipe, each of the kind that it has to be, or an error that names its key.

Idea: a reader takes a value and its address and gives the value back, typed, or raises what came and what is allowed.
Readers of lists and objects are made of those of what is in them. So a key is checked by naming its reader, and nothing
of the wrong kind reaches the code that works with it.
Use when: the JSON is somebody else's format, as graders and schemas are. Knobs of our own are models of pydantic.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, TypeVar

from luthier.core.errors import RecipeError

T = TypeVar("T")
Reader = Callable[[object, str], T]
"""What takes a value and its address, and gives the value or raises RecipeError."""
_MOST: Final = sys.float_info.max


def refused(value: object, where: str, allowed: str) -> RecipeError:
    """The error for a value that is not what its key holds."""
    return RecipeError(f"{where} is {value!r:.200}", allowed=allowed)


def text(value: object, where: str) -> str:
    """A text."""
    if not isinstance(value, str):
        raise refused(value, where, "a text")
    return value


def filled_text(value: object, where: str) -> str:
    """A text that says something."""
    if not isinstance(value, str) or not value.strip():
        raise refused(value, where, "a text that is not empty")
    return value


def flag(value: object, where: str) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise refused(value, where, "true or false")
    return value


def number(value: object, where: str) -> float:
    """A number that a float holds; true, false and NaN are none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -_MOST <= value <= _MOST:
        raise refused(value, where, "a number")
    return value


def amount(value: object, where: str) -> float:
    """A number of 0 or more."""
    if number(value, where) < 0:
        raise refused(value, where, "a number, 0 or more")
    return number(value, where)


def positive(value: object, where: str) -> float:
    """A number above 0."""
    if number(value, where) <= 0:
        raise refused(value, where, "a number above 0")
    return number(value, where)


def count(value: object, where: str) -> int:
    """A whole number of 0 or more, be it written as 3 or as 3.0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or value % 1:
        raise refused(value, where, "a whole number, 0 or more")
    return int(value)


def size(value: object, where: str) -> int:
    """A whole number of 1 or more."""
    if count(value, where) < 1:
        raise refused(value, where, "a whole number, 1 or more")
    return count(value, where)


def bounds(value: object, where: str) -> tuple[float, float]:
    """The least and the most, as a list of two numbers."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise refused(value, where, "[LEAST, MOST], two numbers")
    least, most = (number(each, f"{where}[{at}]") for at, each in enumerate(value))
    if least >= most:
        raise refused(value, where, "[LEAST, MOST], the least first")
    return least, most


def one_of(names: Collection[str]) -> Reader[str]:
    """The reader of one of these texts."""

    def read(value: object, where: str) -> str:
        if not isinstance(value, str) or value not in names:
            raise refused(value, where, ", ".join(names))
        return value

    return read


def listed(reader: Reader[T], *, least: int = 1) -> Reader[list[T]]:
    """The reader of a list with so many items or more."""

    def read(value: object, where: str) -> list[T]:
        if not isinstance(value, list | tuple) or len(value) < least:
            raise refused(value, where, f"a list of {least} or more")
        return [reader(each, f"{where}[{at}]") for at, each in enumerate(value)]

    return read


def named(reader: Reader[T], *, least: int = 0) -> Reader[dict[str, T]]:
    """The reader of an object with so many keys or more, whatever they are called."""

    def read(value: object, where: str) -> dict[str, T]:
        if not isinstance(value, Mapping) or len(value) < least:
            raise refused(value, where, f"an object with {least} or more keys" if least else "an object")
        return {text(key, f"a key of {where}"): reader(each, f"{where}.{key}") for key, each in value.items()}

    return read


def anything(value: object, _where: str) -> Any:
    """Any value."""
    return value
