"""Texts of graders: templates that a row and an answer fill in, and formulas over the results of other graders.

Idea: `{{item.x}}` is a column of the row, `{{sample.output_text}}` the answer. A name that is not there is an error,
and what is filled in is never read again, so no answer can write a template. A formula is a tree of the few operations
that are known; what else it says is told when it is read, and what has no value (1 / 0) when it is computed.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Final

from luthier.core.errors import DataError, RecipeError
from luthier.data import typed_json


class NoAnswerError(Exception):
    """The answer does not have what a template asks of it."""


_FIELD: Final = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_PATH: Final = re.compile(r"\s*(item|sample)((?:\.\w+|\[\d+\])+)\s*")
_TEMPLATES: Final = "{{item.COLUMN}} or {{sample.output_text}}"


def template(value: object, where: str) -> str:
    """A text whose fields can all be filled in. Raises RecipeError."""
    found = typed_json.text(value, where)
    for field in _FIELD.finditer(found):
        if _PATH.fullmatch(field[1]) is None:
            raise RecipeError(f"{where}: the template says {field[0]}", allowed=_TEMPLATES)
    if "{{" in (rest := _FIELD.sub("", found)):
        opened = rest[rest.index("{{") :]
        raise RecipeError(f"{where}: the template opens {opened!r:.80} and does not close it", allowed=_TEMPLATES)
    return found


def filled(template: str, names: Mapping[str, Any]) -> str:
    """The text with what `names` say. Raises DataError where the row lacks something, NoAnswerError for the answer."""

    def value(found: re.Match[str]) -> str:
        path = _PATH.fullmatch(found[1])
        if path is None:
            raise RecipeError(f"the template says {found[0]}", allowed=_TEMPLATES)
        return _looked_up(path[1], re.findall(r"\w+", path[2]), names)

    return _FIELD.sub(value, template)


def require_columns(template: str, facts: Mapping[str, Any]) -> None:
    """Raise DataError where a row lacks something that the template asks of it."""
    for field in _FIELD.findall(template):
        path = _PATH.fullmatch(field)
        if path is not None and path[1] == "item":
            _looked_up("item", re.findall(r"\w+", path[2]), {"item": {"prompt": "", **facts}})


def _looked_up(start: str, keys: list[str], names: Mapping[str, Any]) -> str:
    found = names[start]
    for at, key in enumerate(keys):
        if isinstance(found, list) and key.isdigit() and int(key) < len(found):
            found = found[int(key)]
        elif isinstance(found, Mapping) and key in found:
            found = found[key]
        elif start == "sample" and keys[0] != "output_text":
            raise NoAnswerError(f"the answer has no {'.'.join(keys)}")
        else:
            raise DataError(f"the row has no {'.'.join(keys[: at + 1])!r}", allowed=f"one of {', '.join(names[start])}")
    return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)


# -------------------------------------------------------------------------------------------------------- formulas

_FUNCTIONS: Final[Mapping[str, tuple[Callable[..., float], int, int]]] = {
    "abs": (abs, 1, 1), "ceil": (math.ceil, 1, 1), "exp": (math.exp, 1, 1), "floor": (math.floor, 1, 1),
    "log": (math.log, 1, 2), "max": (max, 2, 99), "min": (min, 2, 99), "sqrt": (math.sqrt, 1, 1),
}  # fmt: skip
"""Functions, with the fewest and the most arguments of each."""
_OPERATORS: Final[Mapping[type, Callable[[float, float], float]]] = {
    ast.Add: lambda one, two: one + two, ast.Sub: lambda one, two: one - two, ast.Mult: lambda one, two: one * two,
    ast.Div: lambda one, two: one / two, ast.Pow: math.pow,
}  # fmt: skip


def formula(value: object, where: str, names: Collection[str]) -> ast.expr:
    """The tree of a formula over the results of graders of these names. Raises RecipeError."""
    found = typed_json.text(value, where)
    allowed = f"numbers, + - * / ^, {', '.join(_FUNCTIONS)} and the graders {', '.join(names)}"
    try:
        tree = ast.parse(found.strip().replace("^", "**"), mode="eval").body
        strange = next(_strange(tree, names), None)
    except SyntaxError as failure:
        raise RecipeError(f"{where} is {found!r:.200}: {failure.msg}", allowed=allowed) from failure
    except (ValueError, RecursionError, MemoryError) as failure:
        # A NUL, or brackets in brackets beyond the parser's stack.
        raise RecipeError(f"{where} is {found!r:.200}: {failure}", allowed=allowed) from failure
    if strange is not None:
        raise RecipeError(f"{where} is {found!r:.200}: {ast.unparse(strange)!r} is not known", allowed=allowed)
    return tree


def computed(node: ast.expr, values: Mapping[str, float]) -> float:
    """The value of a formula. Raises ArithmeticError or ValueError where it has none."""
    if isinstance(node, ast.Constant):
        return float(node.value)  # type: ignore[arg-type]
    if isinstance(node, ast.Name):
        return values[node.id]
    if isinstance(node, ast.UnaryOp):
        return -computed(node.operand, values)
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](computed(node.left, values), computed(node.right, values))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return float(_FUNCTIONS[node.func.id][0](*(computed(each, values) for each in node.args)))
    raise TypeError(f"{type(node).__name__} in a formula that was read")


def _strange(node: ast.expr, names: Collection[str]) -> Iterator[ast.expr]:
    """What of a formula is not known, the outermost first."""
    inner: list[ast.expr] = []
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = [node.operand]
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        inner = [node.left, node.right]
    elif _is_call(node):
        inner = node.args  # type: ignore[attr-defined]
    elif not (isinstance(node, ast.Name) and node.id in names) and not _is_number(node):
        yield node
    for each in inner:
        yield from _strange(each, names)


def _is_number(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool)


def _is_call(node: ast.expr) -> bool:
    if not isinstance(node, ast.Call) or node.keywords or not isinstance(node.func, ast.Name):
        return False
    _, least, most = _FUNCTIONS.get(node.func.id, (abs, 1, 0))
    return least <= len(node.args) <= most
