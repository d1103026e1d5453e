"""The catalog: a plural folder is the registry of its family, an entry-point group opens it to other packages.

`luthier/adapters/lora.py` *is* the method `lora` of the family `adapters`; nothing else lists it. Names and cards
are read without importing the file (a card is its docstring), so help and docs stay free of torch. Other packages
add a method with an entry point in the group `luthier.<family>` whose value is the module that holds it.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import RecipeError
from luthier.core.nearest import choice, did_you_mean

if TYPE_CHECKING:
    from luthier.core.knobs import Method

ROOT = Path(__file__).resolve().parents[1]
CARD_KEYS = ("Idea", "Equation", "Source", "Cost", "Use when", "Not when")


@dataclass(frozen=True)
class Card:
    """What a method says of itself, from the docstring of its file."""

    family: str
    name: str
    title: str
    sections: dict[str, str]


@cache
def families() -> tuple[str, ...]:
    """The plural folders that hold methods: those whose `__init__.py` defines a subclass of `Method`."""
    found = []
    for folder in sorted(ROOT.iterdir()):
        contract = folder / "__init__.py"
        if contract.is_file() and re.search(r"^class \w+\(Method\b", contract.read_text("utf-8"), re.MULTILINE):
            found.append(folder.name)
    return tuple(found)


@cache
def modules(family: str) -> dict[str, str]:
    """Method name -> module path, for the files of the folder and the entry points of other packages."""
    if family not in families():
        raise RecipeError(f"{family!r} is no family of methods", do=did_you_mean(family, families()))
    found = {
        path.stem: f"luthier.{family}.{path.stem}"
        for path in sorted((ROOT / family).glob("*.py"))
        if not path.stem.startswith("_")
    }
    for entry in _entry_points().select(group=f"luthier.{family}"):
        found.setdefault(entry.name, entry.module)
    return found


@cache
def _entry_points() -> Any:
    """Those of all packages, of a type that changed with Python 3.12. Read once: Python looks into each package."""
    # It reads mail headers, which takes a tenth of what `luthier --help` may take.
    from importlib.metadata import entry_points

    return entry_points()


def names(family: str) -> list[str]:
    """The names of the methods of `family`, sorted."""
    return sorted(modules(family))


@cache
def load(family: str, name: str) -> type[Method]:
    """The method class in the file `name` of `family`.

    Raises RecipeError with the nearest names when there is no such file.
    """
    known = modules(family)
    if name not in known:
        raise RecipeError(f"{name!r} is no method of {family}", do=choice(name, known))
    # Names and cards are asked for where pydantic is not: it takes a third of what `luthier --help` may take.
    from luthier.core.knobs import Method

    module = importlib.import_module(known[name])
    kinds = [
        kind
        for kind in vars(module).values()
        if inspect.isclass(kind) and issubclass(kind, Method) and kind.__module__ == module.__name__
    ]
    if len(kinds) != 1:
        raise RecipeError(f"{known[name]} holds {len(kinds)} methods", allowed="exactly one method a file")
    return kinds[0]


def find(name: str) -> list[tuple[str, str]]:
    """Every (family, method) called `name`, in all families."""
    return [(family, name) for family in families() if name in modules(family)]


@cache
def card(family: str, name: str) -> Card:
    """The card of a method, read from its file without importing it."""
    return _parse_card(family, name, ast.get_docstring(ast.parse(source(family, name).read_text("utf-8"))) or "")


def source(family: str, name: str) -> Path:
    """The file of a method. Raises RecipeError with the nearest names when there is none."""
    known = modules(family)
    if name not in known:
        raise RecipeError(f"{name!r} is no method of {family}", do=choice(name, known))
    if (own := own_file(known[name])) is not None:
        return own
    spec = importlib.util.find_spec(known[name])
    if spec is None or spec.origin is None:
        raise RecipeError(f"the file of {family}.{name} ({known[name]}) cannot be found")
    return Path(spec.origin)


def own_file(module: str) -> Path | None:
    """The file of a module of this package, by its name: Python would import the packages around it to tell."""
    package, *parts = module.split(".")
    if package != ROOT.name:
        return None
    place = ROOT.joinpath(*parts)
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


def _parse_card(family: str, name: str, text: str) -> Card:
    title, _, body = text.partition("\n")
    pattern = "|".join(re.escape(key) for key in CARD_KEYS)
    pieces = re.split(rf"^({pattern}):[ \n]", body, flags=re.MULTILINE)
    sections = {key: " ".join(value.split()) for key, value in zip(pieces[1::2], pieces[2::2], strict=True)}
    return Card(family=family, name=name, title=title.strip(), sections=sections)
