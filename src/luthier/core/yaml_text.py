"""YAML text to plain values, with the place of every key, and nothing that a recipe does not need.

Scalars follow the core schema of YAML 1.2, so `2e-4` is a number and `no` is a word. Refused with their place:
duplicate keys, tags, merge keys, more than a few aliases, deep nesting, long files. Nothing is ever constructed but
texts, numbers, booleans, null, lists and mappings.
Source: YAML 1.2.2, section 10.3.2. Beyond it, digits may be grouped as in Python (`8_192`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final, final

import yaml

from luthier.core.errors import RecipeError

_MOST_CHARACTERS: Final = 256 * 1024
_MOST_ALIASES: Final = 50
_MOST_VALUES: Final = 20_000
_DEEPEST: Final = 24
_TAG: Final = "tag:yaml.org,2002:"


@final
@dataclass(frozen=True, slots=True)
class Position:
    """A place in a text, counted from 1."""

    line: int
    column: int


@final
@dataclass(frozen=True, slots=True)
class Parsed:
    """The value of a text, and where each key stands; keys are paths like `("adapter", "rank")`."""

    value: Any
    positions: Mapping[tuple[str, ...], Position]


def parse(text: str, *, name: str) -> Parsed:
    """The value of the YAML document `text`; `name` says in errors where it came from."""
    if len(text) > _MOST_CHARACTERS:
        raise RecipeError(f"{len(text):,} characters", allowed=f"at most {_MOST_CHARACTERS:,}", where=name)
    try:
        node = _composed(text, name)
    except yaml.MarkedYAMLError as failure:
        where = _address(name, failure.problem_mark or failure.context_mark)
        raise RecipeError(f"not valid YAML: {failure.problem or failure.context}", where=where) from None
    except yaml.YAMLError as failure:
        raise RecipeError(f"not valid YAML: {' '.join(str(failure).split())}", where=name) from None
    if node is None:
        return Parsed(None, {})
    walk = _Walk(name)
    return Parsed(walk.value(node, ()), walk.positions)


def parse_value(text: str, *, name: str) -> Any:
    """The value of a short text, as it stands behind `--set key=`."""
    return parse(text, name=name).value


def _integer(text: str) -> int:
    return int(text.replace("_", ""), 0) if text[:2] in ("0x", "0o") else int(text.replace("_", ""))


def _number(text: str) -> float:
    return float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))


_SCALARS: Final[Mapping[str, tuple[re.Pattern[str], Callable[[str], Any]]]] = {
    "null": (re.compile(r"^(?:~|null|Null|NULL|)$"), lambda text: None),
    "bool": (re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), lambda text: text.lower() == "true"),
    "int": (re.compile(r"^(?:[-+]?[0-9]+(?:_[0-9]+)*|0o[0-7]+|0x[0-9a-fA-F]+)$"), _integer),
    "float": (
        re.compile(
            r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:_[0-9]+)*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        _number,
    ),
    "str": (re.compile(r"^$(?!)"), str),
}


class _Loader(yaml.SafeLoader):
    """Composes nodes only; its scalars are resolved by the patterns above, in their order."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # the name and the place are PyYAML's
        None: [(_TAG + kind, pattern) for kind, (pattern, _) in _SCALARS.items()]
    }


@lru_cache(maxsize=16)
def _composed(text: str, name: str) -> yaml.Node | None:
    """The nodes of a text. Kept: a command asks a recipe several things, each of which reads the file."""
    _check_events(text, name)
    return yaml.compose(text, Loader=_Loader)


def _check_events(text: str, name: str) -> None:
    """Count nesting and aliases before anything recursive reads the text."""
    depth = aliases = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.AliasEvent):
            aliases += 1
        if depth > _DEEPEST or aliases > _MOST_ALIASES:
            raise RecipeError(
                "nested too deeply" if depth > _DEEPEST else "too many aliases",
                allowed=f"{_DEEPEST} levels and {_MOST_ALIASES} aliases",
                where=_address(name, event.start_mark),
            )


@dataclass
class _Walk:
    """Turns nodes into values; counts them, because an alias is walked each time it is used."""

    name: str
    positions: dict[tuple[str, ...], Position] = field(default_factory=dict)
    seen: int = 0

    def value(self, node: yaml.Node, path: tuple[str, ...]) -> Any:
        self.seen += 1
        if self.seen > _MOST_VALUES or len(path) > _DEEPEST:
            where = _address(self.name, node.start_mark)
            raise RecipeError("too many values", allowed=f"at most {_MOST_VALUES:,}", where=where)
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self.value(item, (*path, str(index))) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        raise self._refused(node)

    def _mapping(self, node: yaml.MappingNode, path: tuple[str, ...]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            where = _address(self.name, key_node.start_mark)
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError("a key that is itself a list or mapping", allowed="plain keys", where=where)
            # A key is its text, whatever it looks like: `on` and `1` are keys too.
            key = self._text(key_node)
            here = (*path, key)
            if key == "<<":
                raise RecipeError("a merge key (<<)", do="write the keys out", where=where)
            if key in found:
                line = self.positions[here].line
                raise RecipeError(f"{key} stands twice, first in line {line}", do="keep one of the two", where=where)
            self.positions[here] = Position(key_node.start_mark.line + 1, key_node.start_mark.column + 1)
            found[key] = self.value(value_node, here)
        return found

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        kind = str(node.tag).removeprefix(_TAG)
        if kind not in _SCALARS:
            raise self._refused(node)
        pattern, make = _SCALARS[kind]
        if kind != "str" and not pattern.match(node.value):
            raise RecipeError(f"{node.value!r} is no {kind}", where=_address(self.name, node.start_mark))
        return make(self._text(node))

    def _text(self, node: yaml.ScalarNode) -> str:
        """The text of a scalar; two escapes that make one character, as JSON writes them, are joined."""
        try:
            return str(node.value).encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            where = _address(self.name, node.start_mark)
            raise RecipeError("half of a surrogate pair", allowed="whole characters", where=where) from None

    def _refused(self, node: yaml.Node) -> RecipeError:
        tag = str(node.tag).replace(_TAG, "!!")
        return RecipeError(
            f"the tag {tag}", allowed="plain texts, numbers, lists and mappings", do="remove the tag",
            where=_address(self.name, node.start_mark),
        )


def _address(name: str, mark: Any) -> str:
    return name if mark is None else f"{name}:{mark.line + 1}:{mark.column + 1}"
