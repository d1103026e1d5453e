"""Recipes as written: layers of plain values, each leaf with its origin.

Idea: what a run is made of comes in layers, each stronger than the one before: defaults < preset < file < environment
(`LUTHIER_SET__ADAPTER__RANK=32`) < `--set adapter.rank=32`. They are merged as plain mappings, before any schema sees
them, and every leaf remembers where it came from. Naming another method drops the knobs of the one before, with a note.
Other tools' names of the same thing (`lora_r`, `cutoff_len`) are understood, with a note.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Final, TypeVar, final

from pydantic import BaseModel

from luthier.core import knobs
from luthier.core.errors import RecipeError
from luthier.core.yaml_text import parse, parse_value

ENVIRONMENT_PREFIX: Final = "LUTHIER_SET__"
_OF_ROWS: Final = (".jsonl", ".csv", ".tsv", ".parquet", ".txt", ".gz")
DEFAULT: Final = "default"
"""The origin of what nobody wrote down."""
_ALIASES: Final = Path(__file__).with_name("aliases.toml")
Model = TypeVar("Model", bound=BaseModel)


@final
@dataclass(frozen=True, slots=True)
class Layer:
    """Plain values of one source. `places` maps every dotted key, leaf or not, to its address."""

    values: Mapping[str, Any]
    places: Mapping[str, str]
    notes: tuple[str, ...] = ()


@final
@dataclass(frozen=True, slots=True)
class Layered:
    """A merged recipe: values, the origin of every leaf, the full address of every key, what is worth saying, and the
    file that it is in, if it is in one."""

    values: dict[str, Any]
    origins: dict[str, str]
    places: dict[str, str]
    notes: tuple[str, ...] = ()
    file: str = ""

    def address(self, key: str) -> str:
        """Where `key`, or the nearest key around it, was written; else the file, and empty for what is a default."""
        while key:
            if key in self.places:
                return self.places[key] if self.places[key] != DEFAULT else ""
            key = key.rpartition(".")[0]
        return self.file


def read_layers(
    file: Path | None,
    *,
    sets: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    preset: Layer | None = None,
    defaults: Mapping[str, Any] | None = None,
    known: Collection[str] = (),
) -> Layered:
    """The merged recipe. `known` are the top-level keys of the schema: they are never read as another tool's names.

    Raises RecipeError where a file is to say it, and neither that nor anything stronger does.
    """
    layers = [plain_layer(defaults or {}, origin=DEFAULT)]
    if preset is not None:
        layers.append(preset)
    if file is not None:
        layers.append(read_layer(file, known=known))
    above = [environment_layer(environ or {}, known=known), set_layer(sets, known=known)]
    if file is not None and not any(layer.values for layer in (layers[-1], *above)):
        raise RecipeError("the recipe is empty", allowed="a mapping of keys to values", where=str(file),
                          do="write one with: luthier init recipe.yaml --data FILE --model MODEL")  # fmt: skip
    return replace(merge([*layers, *above]), file="" if file is None else str(file))


def read_layer(file: Path, *, known: Collection[str] = ()) -> Layer:
    """The layer of a YAML file."""
    if file.suffix in _OF_ROWS and file.is_file():
        raise RecipeError(f"{file} is a data file", allowed="a recipe, in YAML",
                          do=f"write one with: luthier init recipe.yaml --data {file} --model MODEL")  # fmt: skip
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise no_recipe(file) from None
    except (OSError, UnicodeDecodeError) as failure:
        why = failure.strerror if isinstance(failure, OSError) else "it is no UTF-8 text"
        raise RecipeError(f"the recipe cannot be read: {why}", where=str(file), do="check the path") from None
    return text_layer(text, name=str(file), known=known)


def no_recipe(file: Path) -> RecipeError:
    """The error for a recipe that is not there."""
    return RecipeError(f"there is no recipe {file}", do="check the path, or write one with: luthier init")


def text_layer(text: str, *, name: str, known: Collection[str] = ()) -> Layer:
    """The layer of YAML text; `name` stands for the file in addresses."""
    parsed = parse(text, name=name)
    if parsed.value is None:
        return Layer({}, {})
    if not isinstance(parsed.value, dict):
        kind = "list" if isinstance(parsed.value, list) else "single value"
        raise RecipeError(f"a recipe that is a {kind}", allowed="a mapping of keys to values", where=name)
    places = {".".join(path): f"{name}:{at.line}:{at.column}" for path, at in parsed.positions.items()}
    assigned = [(key, value, places[key]) for key, value in parsed.value.items()]
    return _layer(assigned, places, known)


def environment_layer(environ: Mapping[str, str], *, known: Collection[str] = ()) -> Layer:
    """The layer of the variables that start with LUTHIER_SET__; two underscores stand for a dot."""
    assigned = []
    for variable in sorted(environ):
        if variable.startswith(ENVIRONMENT_PREFIX):
            key = variable.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".")
            assigned.append((_checked(key, variable), parse_value(environ[variable], name=variable), variable))
    return _layer(assigned, {}, known)


def set_layer(assignments: Sequence[str], *, known: Collection[str] = ()) -> Layer:
    """The layer of `--set key=value` options; the value is YAML, a later option wins."""
    assigned = []
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise RecipeError(f"--set {assignment}", allowed="--set key=value", do="for example --set adapter.rank=32")
        name = f"--set {key.strip()}"
        assigned.append((_checked(key.strip(), name), parse_value(value, name=name), "--set"))
    return _layer(assigned, {}, known)


def plain_layer(values: Mapping[str, Any], *, origin: str) -> Layer:
    """A layer of values that no user wrote down: defaults, or a preset by its name."""
    return _layer([(key, value, origin) for key, value in values.items()], {}, frozenset(values))


def merge(layers: Iterable[Layer]) -> Layered:
    """The layers on top of each other, later ones stronger."""
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    notes: list[str] = []
    for layer in layers:
        notes += layer.notes
        for key, value in layer.values.items():
            notes += _overlay(values, places, (key,), value, layer.places)
    places = {key: place for key, place in places.items() if _present(values, key)}
    leaves = dict(_leaves(values, ""))
    origins = {key: _origin(places.get(key) or _nearest_place(places, key)) for key in leaves}
    return Layered(values=values, origins=origins, places=places, notes=tuple(notes))


def validated(kind: type[Model], layered: Layered) -> Model:
    """The recipe of type `kind`; errors name the file, line and column of the key at fault."""
    return knobs.validate(kind, layered.values, address=layered.address)


def origins_table(model_dump: Mapping[str, Any], layered: Layered) -> list[tuple[str, Any, str]]:
    """(key, value, origin) of every leaf of a validated recipe; what nobody set says `default`."""
    return [(key, value, _origin_of(key, layered)) for key, value in _leaves(model_dump, "")]


@cache
def _tables() -> tuple[Mapping[str, str], Mapping[str, str]]:
    tables = tomllib.loads(_ALIASES.read_text(encoding="utf-8"))
    return tables["keys"], tables["bare"]


def _layer(assigned: Sequence[tuple[str, Any, str]], places: Mapping[str, str], known: Collection[str]) -> Layer:
    """One layer from (dotted key, value, place); other tools' names become ours."""
    aliases, _ = _tables()
    values: dict[str, Any] = {}
    found: dict[str, str] = {}
    written: dict[str, str] = {}
    notes: list[str] = []
    for key, value, place in assigned:
        ours = aliases.get(key, key) if key not in known else key
        for leaf in _named(ours, value):
            other = written.setdefault(leaf, key)
            # Two of our own spellings are an order (`--set`, later wins); another tool's name beside ours is a doubt.
            if other != key and (ours != key or other in aliases):
                raise RecipeError(f"{key} and {other} both mean {leaf}", do="keep one of the two", where=place)
        if ours != key:
            notes.append(f"{_origin(place)}: {key} is read as {ours}")
        inner = {ours + deeper[len(key) :]: at for deeper, at in places.items() if deeper.startswith(f"{key}.")}
        own = {**_places_below(value, ours, place), **inner, ours: place}
        # Within one layer the order of keys means nothing, so naming a method drops nothing.
        _assign(values, tuple(ours.split(".")), value)
        found |= own
    return Layer(values=values, places=found, notes=tuple(notes))


def _assign(values: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for depth, part in enumerate(path[:-1]):
        inner = _opened(values.get(part), path[: depth + 1])
        values[part] = inner
        values = inner
    old = values.get(path[-1])
    if isinstance(old, dict) and _is_short(value, path):
        values[path[-1]] = {**old, **_opened(value, path)}
    else:
        values[path[-1]] = value


def _overlay(
    values: dict[str, Any], places: dict[str, str], path: tuple[str, ...], value: Any, upper: Mapping[str, str]
) -> list[str]:
    """Put `value` at `path` over what is there; give back notes on what that dropped."""
    key, part = ".".join(path), path[-1]
    old = values.get(part)
    if key in upper:
        places[key] = upper[key]
    if not isinstance(value, Mapping) and not (_is_short(value, path) and isinstance(old, dict)):
        values[part] = value
        return []
    notes: list[str] = []
    new = _opened(value, path)
    base = _opened(old, path)
    if "method" in new and "method" in base and new["method"] != base["method"]:
        dropped = [f"{name}={base[name]!r}" for name in base if name != "method"]
        if dropped:
            place = _origin(upper.get(f"{key}.method") or upper.get(key, ""))
            notes.append(f"{place}: {key} is {new['method']}; dropped of {base['method']}: {', '.join(dropped)}")
        base = {}
    values[part] = base
    for name, item in new.items():
        inner = f"{key}.{name}"
        if inner not in upper and key in upper:
            places[inner] = upper[key]
        notes += _overlay(base, places, (*path, name), item, upper)
    return notes


def _opened(value: Any, path: tuple[str, ...]) -> dict[str, Any]:
    """A mapping that may be added to: a copy of `value`, or what a bare value is short for."""
    if isinstance(value, Mapping):
        return dict(value)
    return {_short_for(path[0]): value} if _is_short(value, path) else {}


def _is_short(value: Any, path: tuple[str, ...]) -> bool:
    """Whether `value` may be short for a mapping, as `adapter: lora` is."""
    _, bare = _tables()
    return len(path) == 1 and (isinstance(value, str) or (isinstance(value, (list, tuple)) and path[0] in bare))


def _short_for(key: str) -> str:
    _, bare = _tables()
    return bare.get(key, "method")


def _checked(key: str, name: str) -> str:
    if not key or not all(key.split(".")):
        raise RecipeError(f"{name}: {key!r} is no key", allowed="keys like adapter.rank")
    return key


def _named(key: str, value: Any) -> list[str]:
    """The dotted leaves that `value` at `key` gives."""
    return [inner for inner, _ in _leaves({key: value}, "")]


def _places_below(value: Any, key: str, place: str) -> dict[str, str]:
    return {inner: place for inner, _ in _leaves(value, f"{key}.")} if isinstance(value, Mapping) else {}


def _leaves(value: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is no mapping, and of empty mappings."""
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from _leaves(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def _present(values: Mapping[str, Any], key: str) -> bool:
    inner: Any = values
    for part in key.split("."):
        if isinstance(inner, list) and part.isdigit():
            return True
        if not isinstance(inner, Mapping) or part not in inner:
            return False
        inner = inner[part]
    return True


def _nearest_place(places: Mapping[str, str], key: str) -> str:
    while key:
        key = key.rpartition(".")[0]
        if key in places:
            return places[key]
    return DEFAULT


def _origin_of(key: str, layered: Layered) -> str:
    if key in layered.origins:
        return layered.origins[key]
    # A bare value stands for one knob of the mapping the schema made of it; the others are defaults.
    parent, _, name = key.rpartition(".")
    is_short = parent in layered.origins and name == _short_for(parent)
    return layered.origins[parent] if is_short else DEFAULT


def _origin(place: str) -> str:
    """The address without its column; `--set`, variables and names stay as they are."""
    head, _, column = place.rpartition(":")
    return head if head and column.isdigit() else place
