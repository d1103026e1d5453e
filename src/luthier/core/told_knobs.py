"""The knobs of a method, read from its file without importing it, as its card is.

Idea: `luthier describe lora` is asked by somebody who waits for it, and importing the file would import torch. The
fields of a method are plain statements (`rank: int = Field(16, description="...")`), its own and those of the classes
it derives from. Whatever is not as plain as that, such as a default that a function makes, has the file imported.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

from luthier.core import catalog

_EMPTY: Final = {"dict": dict, "list": list, "tuple": tuple}
METHOD: Final = "luthier.core.knobs.Method"
_LATER: Final = None
"""Stands for a field that a class which is no method asks of those that derive from it: its place is there."""


@dataclass(frozen=True)
class Told:
    """A knob: its name, what it is when nothing is said, whether something has to be said, and what it means."""

    name: str
    default: Any
    required: bool
    description: str


class _NotPlainError(Exception):
    """Something in a file that only Python itself can tell."""


def told_knobs(family: str, name: str) -> list[Told]:
    """The knobs of a method, in their order. Raises RecipeError when there is none of that name."""
    read = read_knobs(catalog.source(family, name))
    return imported_knobs(family, name) if read is None else read


def read_knobs(path: Path) -> list[Told] | None:
    """The knobs of the method in a file, as it is written; None where only Python can tell."""
    try:
        return list(_parsed(path).method_knobs().values())
    except _NotPlainError:
        return None


def imported_knobs(family: str, name: str) -> list[Told]:
    """The same from the class itself."""
    from luthier.core.knobs import Method

    found = []
    for key, known in catalog.load(family, name).model_fields.items():
        default = None if known.is_required() else known.get_default(call_default_factory=True)
        default = default.as_recipe() if isinstance(default, Method) else default
        found.append(Told(key, default, known.is_required(), known.description or ""))
    return found


@dataclass(frozen=True)
class _File:
    """What a file says at its top: classes, constants, and where other names come from."""

    classes: dict[str, ast.ClassDef] = field(default_factory=dict)
    constants: dict[str, ast.expr] = field(default_factory=dict)
    imported: dict[str, tuple[str, str]] = field(default_factory=dict)

    def method_knobs(self) -> dict[str, Told]:
        """The knobs of the one method in this file."""
        found = [knobs for is_method, knobs in map(self.knobs_of, self.classes) if is_method]
        if len(found) != 1 or _LATER in found[0].values():
            raise _NotPlainError
        return {key: told for key, told in found[0].items() if told is not None}

    def knobs_of(self, name: str) -> tuple[bool, dict[str, Told | None]]:
        """Whether a class is a method, and its fields, inherited ones first as pydantic has them."""
        if name not in self.classes:
            module, there = self.imported.get(name, ("", name))
            path = catalog.own_file(module)
            if path is None or f"{module}.{there}" == METHOD:
                return f"{module}.{there}" == METHOD, {}
            return _parsed(path).knobs_of(there)
        bases = [self.knobs_of(base.id) for base in self.classes[name].bases if isinstance(base, ast.Name)]
        is_method = any(known for known, _ in bases)
        found: dict[str, Told | None] = {}
        for _, inherited in reversed(bases):
            found |= inherited
        for line in self.classes[name].body:
            if isinstance(line, ast.AnnAssign) and not ast.unparse(line.annotation).startswith("ClassVar"):
                told = self._told(line) if is_method else _LATER
                found[ast.unparse(line.target)] = told
        return is_method, found

    def _told(self, line: ast.AnnAssign) -> Told:
        if not isinstance(line.value, ast.Call) or ast.unparse(line.value.func) != "Field":
            raise _NotPlainError
        said = {keyword.arg: keyword.value for keyword in line.value.keywords}
        if line.value.args:
            said["default"] = line.value.args[0]
        default = None
        if "default" in said:
            default = self._value(said["default"])
        elif "default_factory" in said:
            made = _EMPTY.get(ast.unparse(said["default_factory"]))
            if made is None:
                raise _NotPlainError
            default = made()
        required = not {"default", "default_factory"} & set(said)
        return Told(ast.unparse(line.target), default, required, self._value(said["description"]))

    def _value(self, node: ast.expr) -> Any:
        """A value as it is written; a name stands for the constant of this file, or of one of ours."""
        if isinstance(node, ast.Tuple):
            return tuple(self._value(each) for each in node.elts)
        if isinstance(node, ast.Name) and node.id in self.constants:
            return self._value(self.constants[node.id])
        if isinstance(node, ast.Name):
            module, there = self.imported.get(node.id, ("", ""))
            path = catalog.own_file(module)
            if path is None:
                raise _NotPlainError
            return _parsed(path)._value(ast.Name(there))
        try:
            return ast.literal_eval(node)
        except ValueError:
            raise _NotPlainError from None


@cache
def _parsed(path: Path) -> _File:
    found = _File()
    for line in ast.parse(path.read_text("utf-8")).body:
        if isinstance(line, ast.ClassDef):
            found.classes[line.name] = line
        elif isinstance(line, ast.Assign):
            names, values = line.targets[:1], [line.value]
            if isinstance(names[0], ast.Tuple) and isinstance(line.value, ast.Tuple):
                names, values = names[0].elts, line.value.elts
            found.constants.update(zip(map(ast.unparse, names), values, strict=False))
        elif isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value is not None:
            found.constants[line.target.id] = line.value
        elif isinstance(line, ast.ImportFrom) and line.module and not line.level:
            found.imported.update({each.asname or each.name: (line.module, each.name) for each in line.names})
    return found
