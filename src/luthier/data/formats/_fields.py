"""Reading single values of a row: strings that must be there, columns under several names, errors with a path."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TypeGuard

from luthier.core.errors import DataError
from luthier.core.nearest import did_you_mean
from luthier.data.strict_json import Place, excerpt, parse

Path = tuple[str | int, ...]
SHOWN = 60


class FieldError(DataError):
    """A DataError that knows the path inside the row, so that the reader can find its line and column."""

    def __init__(self, received: str, *, path: Path = (), allowed: str = "", do: str = "", where: str = "") -> None:
        super().__init__(received, allowed=allowed, do=do, where=where)
        self.path = path


def dotted(path: Path) -> str:
    """A path the way errors write it: `messages[2].role`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def kind_of(value: object) -> str:
    """The type of a value in the words of a data file."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "a string"
    if isinstance(value, Mapping):
        return "an object"
    if is_list(value):
        return "a list"
    return f"a {type(value).__name__}"


def shown(value: object) -> str:
    """A value for an error: the beginning of a string, the type of anything else."""
    return excerpt(value[: SHOWN + 1], limit=SHOWN) if isinstance(value, str) else kind_of(value)


def is_list(value: object) -> TypeGuard[Sequence[object]]:
    """Whether a value is a list; strings are not."""
    return isinstance(value, list | tuple)


def text_at(value: object, path: Path, where: str) -> str:
    """A value that must be a string."""
    if not isinstance(value, str):
        raise FieldError(f"{dotted(path)} is {kind_of(value)}", path=path, allowed="expected a string", where=where)
    return value


def filled(value: object, path: Path, where: str, *, what: str) -> str:
    """A value that must be a string with something in it; `what` names it in the error."""
    text = text_at(value, path, where)
    if not text or text.isspace():
        raise FieldError(f"{what} is empty ({dotted(path)})", path=path, allowed="expected some text", where=where)
    return text


def class_name(value: object, path: Path, where: str) -> str:
    """The name of a class: text, a whole number, or true or false."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str) and value.strip():
        return value.strip()
    came = str(value) if isinstance(value, float) else "empty" if isinstance(value, str) else kind_of(value)
    raise FieldError(
        f"{dotted(path)} is {came}",
        path=path,
        allowed="expected the name of a class: text, a whole number, or true or false",
        where=where,
    )


def listed(value: object, path: Path, where: str, *, of: str) -> Sequence[object]:
    """A list with something in it, or a string that holds one as JSON; `of` names what it is a list of."""
    values = json_at(value, path, where) if isinstance(value, str) and value.lstrip().startswith("[") else value
    if not is_list(values):
        came = f"{dotted(path)} is {kind_of(values)}"
        raise FieldError(came, path=path, allowed=f"expected a list of {of}", where=where)
    if not values:
        raise FieldError(f"{dotted(path)} is an empty list", path=path, allowed=f"expected {of}", where=where)
    return values


def column(values: Mapping[str, object], name: str, where: str) -> object:
    """The value of a column that must be there."""
    if name not in values:
        raise FieldError(f"the column {excerpt(name)} is missing", allowed=did_you_mean(name, values), where=where)
    return values[name]


def pick(values: Mapping[str, object], names: Sequence[str]) -> str | None:
    """The column that goes by the first of `names` the row has, whatever its capitals."""
    lowered = _lowered(values)
    return next((lowered[name] for name in names if name in lowered), None)


def _lowered(values: Mapping[str, object]) -> dict[str, str]:
    """The names of columns as they are written, by what they are without capitals."""
    return {str(key).strip().lower(): key for key in values}


def pick_pair(values: Mapping[str, object], pairs: tuple[tuple[str, str], ...]) -> tuple[str, str] | None:
    """The columns of the first (prompt, answer) pair of names that the row has, whatever their capitals."""
    return None if is_preference(values) else _pair_among(tuple(values), pairs)


@lru_cache(maxsize=256)
def _pair_among(columns: tuple[str, ...], pairs: tuple[tuple[str, str], ...]) -> tuple[str, str] | None:
    # The rows of a file have the same columns, nearly always.
    lowered = _lowered(dict.fromkeys(columns))
    return next(((lowered[one], lowered[two]) for one, two in pairs if one in lowered and two in lowered), None)


def is_preference(values: Mapping[str, object]) -> bool:
    """Whether the row holds two answers: read as one conversation, it would lose them."""
    return "chosen" in values and "rejected" in values


def number_at(value: object, path: Path, where: str) -> float:
    """A value that must be a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        came = f"{dotted(path)} is {value if isinstance(value, float) else kind_of(value)}"
        raise FieldError(came, path=path, allowed="expected a finite number", where=where)
    return float(value)


def json_at(text: str, path: Path, where: str) -> object:
    """The value of a string that holds JSON."""
    try:
        return parse(text, Place("", 1, 1))
    except DataError as failure:
        raise FieldError(
            f"{dotted(path)} is no JSON: {failure.received} (there at {failure.where[1:]})",
            path=path,
            allowed=failure.allowed,
            do=failure.do,
            where=where,
        ) from None
