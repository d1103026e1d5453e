"""What tests find in place of a candidate's functions and objects: each use of one is a question to the candidate.

Idea: a value that is plain data comes over as such. An object of the candidate's own stays there and gets a number;
tests hold a stand-in that asks for its methods, attributes, length, items. Never asked is what would be a verdict:
whether it equals something, or holds it. Two things are equal if they are one, and `in` looks through the items.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from typing import Any, final

from luthier.sandbox.guest.frames import receive, send
from luthier.sandbox.guest.values import BorderError, packable, unpack_parsed

KINDS = ("value", "thing", "callable")


class GoneError(BaseException):
    """The candidate is not there any more: no test can go on."""


@final
class Questions:
    """The way of a question through the host to the candidate, and back."""

    def __init__(self, channel: int) -> None:
        self._channel = channel

    def call(self, name: str, of: int | None, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Call a function by its name, or a method of the thing `of`."""
        try:
            asked = {"arguments": [_sent(argument) for argument in arguments],
                     "keywords": {key: _sent(value) for key, value in keywords.items()}}  # fmt: skip
        except BorderError as failure:
            self.not_plain()
            raise TypeError(f"{name}: {failure}") from None
        return self._ask({"how": "call", "function": name, "of": of, **asked}, arguments)

    def attribute(self, name: str, of: int) -> Any:
        """What a thing has under this name: data, another thing, or something to be called."""
        return self._ask({"how": "get", "function": name, "of": of, "arguments": [], "keywords": {}}, ())

    def not_plain(self) -> None:
        """Tell the host that a test needs what cannot cross."""
        send(self._channel, {"is": "not-plain"})

    def _ask(self, asked: dict[str, Any], arguments: tuple[Any, ...]) -> Any:
        send(self._channel, {"is": "call", **asked})
        answer = receive(self._channel)
        if "gone" in answer:
            raise GoneError(answer["gone"])
        if "error" in answer:
            raise _known(answer)
        for number, tree in answer["changed"].items():
            _change(arguments[int(number)], unpack_parsed(tree))
        if answer["is"] == "thing":
            return Thing(self, answer["value"])
        if answer["is"] == "callable":
            return Method(self, asked["function"], asked["of"])
        return unpack_parsed(answer["value"])


@final
class Name:
    """A function or a class of the candidate, by its name."""

    __slots__ = ("_name", "_questions")

    def __init__(self, questions: Questions, name: str) -> None:
        self._questions = questions
        self._name = name

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._questions.call(self._name, None, arguments, keywords)

    def __getattr__(self, name: str) -> Name:
        if name.startswith("__"):
            raise AttributeError(name)
        return Name(self._questions, f"{self._name}.{name}")


@final
class Method:
    """Something of a thing that can be called."""

    __slots__ = ("_name", "_of", "_questions")

    def __init__(self, questions: Questions, name: str, of: int) -> None:
        self._questions = questions
        self._name = name
        self._of = of

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._questions.call(self._name, self._of, arguments, keywords)


@final
class Thing:
    """An object that stays with the candidate."""

    __slots__ = ("_number", "_questions")

    def __init__(self, questions: Questions, number: int) -> None:
        self._questions = questions
        self._number = number

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._questions.attribute(name, self._number)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._of("__call__", *arguments, **keywords)

    def __len__(self) -> int:
        return self._of("__len__")

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, key: Any) -> Any:
        return self._of("__getitem__", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._of("__setitem__", key, value)

    def __delitem__(self, key: Any) -> None:
        self._of("__delitem__", key)

    def __iter__(self) -> Iterator[Any]:
        found = self._of("__iter__")
        return found if isinstance(found, Thing) else iter(found)

    def __next__(self) -> Any:
        return self._of("__next__")

    def __str__(self) -> str:
        return self._of("__str__")

    def __repr__(self) -> str:
        return self._of("__repr__")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Thing):
            self._questions.not_plain()
            return False
        return self._number == other._number

    def __hash__(self) -> int:
        return hash(self._number)

    def _of(self, name: str, *arguments: Any, **keywords: Any) -> Any:
        try:
            return self._questions.call(name, self._number, arguments, keywords)
        except AttributeError as failure:
            # As Python says it of an object that cannot do this; `list` asks for a length and expects it.
            raise TypeError(str(failure)) from None


def _sent(argument: Any) -> Any:
    return {"!": "thing", "of": argument._number} if isinstance(argument, Thing) else packable(argument)


def _known(answer: dict[str, Any]) -> Exception:
    """The exception of the candidate, as the builtin one that it is."""
    kind = getattr(builtins, answer["raised"], Exception)
    words = answer["error"].partition(": ")[2]
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        return RuntimeError(answer["error"])
    try:
        return kind(words)
    except TypeError:
        return RuntimeError(answer["error"])  # one that is made of more than words


def _change(own: Any, new: Any) -> None:
    """What the candidate did to an argument happens to the test's own object."""
    if type(own) is not type(new):
        return
    if isinstance(own, (list, bytearray)):
        own[:] = new
    elif isinstance(own, (dict, set)):
        own.clear()
        own.update(new)
