"""A chat template run on texts that are not there, so that what it does cannot depend on them.

Idea: instead of a message's content the template gets a `Slot`, which can be joined to other text, stripped of white
space and written, and nothing else. Whatever else a template does to it (asks for its length, cuts it, hands it to a
filter) ends the run: that template looks at content, and has to be run on each text. A question whose answer is the
usual one (is there any text? does it hold `</think>`?) is answered so, and becomes a premise: what comes out is
proved for all texts that keep the premises, and for no other.

The result is an outline: literal text, and slots with what is stripped of them. `worker.py` fills it with two sets of
texts and compares it with the template's own renderings before it answers.

Source: symbolic execution (King, 1976), here with one path, the one that rows usually take.
Use through `worker.py`. Not when a value besides `content` matters: all others are what they are, and part of a shape.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, final

import jinja2
from jinja2.nativetypes import NativeCodeGenerator

Strip = tuple[str, str | None]
"""A side ("strip", "lstrip" or "rstrip") and the characters that go, None for white space."""


class LookedError(BaseException):
    """The template did something to a text that depends on what it says.

    Not an Exception: parts of jinja2 take any of those for an answer.
    """


@dataclass(slots=True)
class Premises:
    """What was taken for granted of the texts: those that are not blank, and what they do not hold."""

    filled: set[int] = field(default_factory=set)
    lacks: set[tuple[int, str]] = field(default_factory=set)

    def hold(self, texts: Sequence[str]) -> bool:
        """Whether these texts keep them."""
        return all(texts[slot].strip() for slot in self.filled) and not any(
            needle in texts[slot] for slot, needle in self.lacks
        )


@dataclass(frozen=True, slots=True)
class Part:
    """The text of a slot, stripped in this order."""

    slot: int
    strips: tuple[Strip, ...] = ()

    def of(self, texts: Sequence[str]) -> str:
        text = texts[self.slot]
        for side, characters in self.strips:
            text = getattr(text, side)(characters)
        return text


Piece = str | Part


def _refused(name: str) -> Callable[..., NoReturn]:
    def refuse(self: Slot, *args: object, **kwargs: object) -> NoReturn:
        raise LookedError(name)

    return refuse


@final
class Slot:
    """Text around at least one content that is not there. Neither str nor anything that jinja2 would take for one."""

    __slots__ = ("_parts", "_premises")

    def __init__(self, parts: Iterable[Piece], premises: Premises) -> None:
        self._parts = tuple(parts)
        self._premises = premises

    # What a template may do.

    def __add__(self, other: object) -> Slot:
        return Slot(merged([*self._parts, *self._pieces(other)]), self._premises)

    def __radd__(self, other: object) -> Slot:
        return Slot(merged([*self._pieces(other), *self._parts]), self._premises)

    def strip(self, characters: object = None, /) -> Slot:
        return self._stripped("strip", characters)

    def lstrip(self, characters: object = None, /) -> Slot:
        return self._stripped("lstrip", characters)

    def rstrip(self, characters: object = None, /) -> Slot:
        return self._stripped("rstrip", characters)

    # What is answered as usual, and taken for granted from then on.

    def __bool__(self) -> bool:
        first = self._parts[0]
        if len(self._parts) == 1 and isinstance(first, Part):
            # White space is all that is ever stripped.
            self._premises.filled.add(first.slot)
        return True

    def __contains__(self, needle: object) -> bool:
        if isinstance(needle, str) and any(isinstance(piece, str) and needle in piece for piece in self._parts):
            return True
        return self._lacks(needle)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Slot):
            raise LookedError("==")
        if not isinstance(other, str):
            return False
        return not bool(self) if other == "" else self._lacks(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def startswith(self, prefix: object, *more: object) -> bool:
        return self._begins(prefix, self._parts[0], str.startswith, more)

    def endswith(self, suffix: object, *more: object) -> bool:
        return self._begins(suffix, self._parts[-1], str.endswith, more)

    def split(self, separator: object = None, maxsplit: object = -1) -> list[Slot]:
        self._lacks(separator)
        return [self]

    def replace(self, old: object, new: object, *more: object) -> Slot:
        self._lacks(old)
        return self

    # What ends the run. Attributes that are not here, with dunders that C code asks for, end it as well.

    def __getattr__(self, name: str) -> NoReturn:
        raise LookedError(name)

    __str__ = __repr__ = __format__ = __bytes__ = _refused("str")
    __hash__ = _refused("hash")
    __len__ = _refused("length")
    __iter__ = __next__ = __reversed__ = _refused("iteration")
    __getitem__ = _refused("[]")
    __lt__ = __le__ = __gt__ = __ge__ = _refused("<")
    __int__ = __float__ = __index__ = __complex__ = __round__ = __trunc__ = __abs__ = _refused("number")
    __mul__ = __rmul__ = __mod__ = __rmod__ = _refused("arithmetic")

    # How it is done.

    def _pieces(self, other: object) -> Sequence[Piece]:
        if isinstance(other, Slot):
            return other._parts
        if not isinstance(other, str):
            raise LookedError("+")
        return (other,)

    def _stripped(self, side: str, characters: object) -> Slot:
        if characters is not None and not (isinstance(characters, str) and characters.isspace()):
            raise LookedError(side)
        parts = list(self._parts)
        if len(parts) == 1:
            return Slot([_with(parts[0], side, characters)], self._premises)
        if side != "rstrip":
            self._trim(parts, 0, "lstrip", characters)
        if side != "lstrip":
            self._trim(parts, -1, "rstrip", characters)
        return Slot(parts, self._premises)

    def _trim(self, parts: list[Piece], end: int, side: str, characters: str | None) -> None:
        """Strip one end of several parts."""
        while isinstance(edge := parts[end], str):
            rest = str(getattr(edge, side)(characters))
            if rest:
                parts[end] = rest
                return
            del parts[end]  # there is a slot somewhere
        if len(parts) > 1:
            # A blank text would let what is beside it be stripped as well.
            self._premises.filled.add(edge.slot)
        parts[end] = _with(edge, side, characters)

    def _lacks(self, needle: object) -> bool:
        """False, for a text that is one whole content and is taken not to hold `needle`."""
        (part, *more) = self._parts
        if more or not isinstance(part, Part) or not isinstance(needle, str) or not needle:
            raise LookedError("a part of the text")
        self._premises.lacks.add((part.slot, needle))
        return False

    def _begins(
        self, wanted: object, edge: Piece, begins: Callable[[str, str], bool], more: Sequence[object]
    ) -> bool:
        if more:
            raise LookedError("a part of the text")
        if isinstance(edge, str) and isinstance(wanted, str) and len(wanted) <= len(edge):
            return begins(edge, wanted)
        return self._lacks(wanted)


def _with(part: Piece, side: str, characters: str | None) -> Part:
    if isinstance(part, str):
        raise LookedError(side)  # a slot is never alone with a literal
    return Part(part.slot, (*part.strips, (side, characters)))


def merged(pieces: Iterable[Piece]) -> list[Piece]:
    """The pieces with neighbouring literals joined and empty ones left out."""
    made: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, str) and made and isinstance(made[-1], str):
            made[-1] += piece
        elif piece != "":
            made.append(piece)
    return made


def joined(values: Iterable[object]) -> Any:
    """What texts and slots are together, as a template joins what it writes."""
    found = list(values)
    slots = [value for value in found if isinstance(value, Slot)]
    if not slots:
        return "".join(map(str, found))
    pieces: list[Piece] = []
    for value in found:
        pieces += value._parts if isinstance(value, Slot) else [str(value)]
    return Slot(merged(pieces), slots[0]._premises)


def pieces_of(value: Any) -> Sequence[Piece]:
    """The literals and parts of what was written, in order."""
    return value._parts if isinstance(value, Slot) else (value,)


def written(value: object) -> object:
    """A value as it is written: text, or a slot that stays one."""
    return value if isinstance(value, Slot) else str(value)


_KINDS: Mapping[str, bool] = {
    "string": True, "sequence": True, "iterable": True, "defined": True,
    "mapping": False, "none": False, "undefined": False, "number": False, "integer": False, "float": False,
    "boolean": False, "true": False, "false": False, "callable": False,
}  # fmt: skip
"""What a text is, whatever it says."""
_OPERATORS = ("==", "eq", "equalto", "!=", "ne", "in")


def symbolic(environment: jinja2.Environment) -> None:
    """Make an environment one whose templates may be given slots: what they write are texts and slots."""
    environment.code_generator_class = NativeCodeGenerator
    environment.concat = joined  # type: ignore[method-assign]
    environment.finalize = written
    own: dict[str, Callable[..., Any]] = {
        "trim": _trim,
        "string": _string,
        "default": environment.filters["default"],
        "d": environment.filters["d"],
        "luthier_concat": joined,
    }
    environment.filters = {name: own.get(name) or _guarded(name, each) for name, each in environment.filters.items()}
    del environment.filters["random"]  # one outcome would stand for all
    environment.tests = {name: _test(name, each) for name, each in environment.tests.items()}


def _trim(value: Any, chars: str | None = None) -> Any:
    return value.strip(chars) if isinstance(value, Slot) else jinja2.filters.do_trim(value, chars)


def _string(value: Any) -> Any:
    return value if isinstance(value, Slot) else str(value)


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or a test that ends the run when it is given a slot."""

    @functools.wraps(function)  # with jinja2's marks on it
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, Slot) for value in (*args, *kwargs.values())):
            raise LookedError(name)
        return function(*args, **kwargs)

    return guarded


def _test(name: str, function: Any) -> Any:
    if name in _OPERATORS:
        return function  # the slot's own
    if name not in _KINDS:
        return _guarded(name, function)

    @functools.wraps(function)
    def test(value: Any, *args: Any) -> Any:
        return _KINDS[name] if isinstance(value, Slot) and not args else function(value, *args)

    return test


def with_slots(context: Mapping[str, Any], premises: Premises) -> dict[str, Any]:
    """The context of a rendering with a slot for each content that is a number."""
    messages = [
        {**message, "content": Slot([Part(message["content"])], premises)} if _is_slot(message) else message
        for message in context["messages"]
    ]
    return {**context, "messages": messages}


def with_texts(context: Mapping[str, Any], texts: Sequence[str]) -> dict[str, Any]:
    """The same context with these texts."""
    messages = [
        {**message, "content": texts[message["content"]]} if _is_slot(message) else message
        for message in context["messages"]
    ]
    return {**context, "messages": messages}


def _is_slot(message: Mapping[str, Any]) -> bool:
    return type(message.get("content")) is int


def outline(pieces: Sequence[Piece], premises: Premises) -> str:
    """An outline as JSON."""
    return json.dumps(
        {
            "pieces": [piece if isinstance(piece, str) else [piece.slot, piece.strips] for piece in pieces],
            "filled": sorted(premises.filled),
            "lacks": sorted(premises.lacks),
        }
    )
