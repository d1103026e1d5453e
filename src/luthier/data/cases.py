"""Cases: what a program is called with and what has to come out, compared here and not where the program runs.

Idea: a value from a program is built anew from plain data, so that no comparison of its own arrives with it, and is
compared type by type: True is no 1, 1 is no 1.0, a NaN is wanted only where one is expected, and a list of one number
is not that number. Data in JSON cannot say tuple, so a list is expected where either comes, unless it is told that they
differ.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.core.errors import DataError
from luthier.sandbox.program import Call

_KEYS = ("function", "arguments", "keywords", "expected", "stdin", "stdout")


@dataclass(frozen=True)
class Case:
    """One case: a call and the value that it gives, or a text to read and the text that is printed."""

    call: Call | None = None
    expected: Any = None
    stdin: str = ""
    stdout: str = ""


@dataclass(frozen=True)
class Sameness:
    """When two values are one; the defaults are the strictest that JSON can tell."""

    absolute: float = 0.0
    relative: float = 1e-9
    numbers: bool = False
    """Whether a whole number may come where a float is expected, and the other way round."""
    tuples: bool = False
    """Whether tuples and lists differ."""

    def same(self, said: Any, known: Any) -> bool:
        """Whether a value is the expected one."""
        if isinstance(said, list | tuple) and isinstance(known, list | tuple):
            fits = not self.tuples or type(said) is type(known)
            return fits and len(said) == len(known) and all(map(self.same, said, known))
        if type(said) is not type(known):
            return self.numbers and _are_numbers(said, known) and self._near(float(said), float(known))
        if isinstance(known, float):
            return self._near(said, known)
        if isinstance(known, dict):
            return _keys(said) == _keys(known) and all(self.same(said[key], known[key]) for key in known)
        if isinstance(known, set | frozenset):
            return _keys(said) == _keys(known)
        return bool(said == known)

    def _near(self, said: float, known: float) -> bool:
        if math.isnan(known) or math.isinf(known) or not math.isfinite(said):
            return (math.isnan(said) and math.isnan(known)) or said == known
        return abs(said - known) <= max(self.absolute, self.relative * abs(known))


def _keys(values: Any) -> set[tuple[type, Any]]:
    """Keys with their kinds: to Python, True and 1 are one key."""
    return {(type(key), key) for key in values}


def _are_numbers(*values: object) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values) and all(
        abs(value) < 2**53 for value in values if isinstance(value, int)
    )


def shown(value: object) -> str:
    """The beginning of a value that a program gave, for people. A number too long for Python to write is told so."""
    try:
        return repr(value)[:80]
    except ValueError:
        return "a whole number of thousands of digits"


def same_text(said: str, known: str) -> bool:
    """Whether a program has printed what is expected: line by line, without the blanks that end a line or the text."""
    return list(_lines(said)) == list(_lines(known))


def _lines(text: str) -> Iterator[str]:
    return (line.rstrip() for line in text.strip("\r\n").rstrip().splitlines())


def cases_of(value: object, column: str, function: str = "") -> list[Case]:
    """The cases of a column. Raises DataError for what is none, and for no case at all: that passes nothing."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(f"{column} is {value!r}", allowed="a list of one or more cases", do=_SHAPE)
    return [_case(each, f"{column}[{at}]", function) for at, each in enumerate(value)]


_SHAPE = 'as in {"function": "add", "arguments": [2, 3], "expected": 5} or {"stdin": "2 3", "stdout": "5"}'


def _case(value: object, where: str, function: str) -> Case:
    if not isinstance(value, Mapping) or not ({"expected"} <= set(value) or {"stdout"} <= set(value)):
        raise DataError(f"{where} is {value!r}", allowed="what is expected", do=_SHAPE)
    if unknown := [key for key in value if key not in _KEYS]:
        raise DataError(f"{where} has the key {unknown[0]!r}", allowed=", ".join(_KEYS))
    if "stdout" in value:
        return Case(stdin=str(value.get("stdin", "")), stdout=str(value["stdout"]))
    name = value.get("function", function)
    arguments, keywords = value.get("arguments", []), value.get("keywords", {})
    if not name or not isinstance(arguments, list | tuple) or not isinstance(keywords, Mapping):
        raise DataError(f"{where} is {value!r}", allowed="a function, a list of arguments, named keywords", do=_SHAPE)
    return Case(Call(str(name), tuple(arguments), dict(keywords)), value["expected"])
