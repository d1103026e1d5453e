"""JSON values one after another, in a list or not, read piece by piece: memory holds one value, never the file.

Idea: a value is parsed in what has been read so far. Where that fails, or ends where the reading ended, the value may
only have been cut, so more is read and it is parsed again; doubling what is held keeps the work linear.

Source: RFC 8259 (JSON). Use when: a file is one JSON list, or objects that are spread over lines.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, final

from luthier.core.errors import DataError
from luthier.data.strict_json import EXCERPT, Place, excerpt, parse_at, skip_space, skip_value

MAX_VALUE: Final = 64 * 2**20
"""Characters of one value; a longer one is a broken file, not a row."""


@dataclass(frozen=True, slots=True)
class Element:
    """A value: what it is, the place where it begins, and its text."""

    value: object
    place: Place
    source: str


def elements(pieces: Iterator[str], name: str) -> Iterator[Element | DataError]:
    """The elements of the JSON list that `pieces` are, or the values one after another; a bad one hides no other.

    Raises DataError where the text stops being JSON, since nothing behind that can be trusted.
    """
    window = _Window(pieces, Place(name))
    in_list = window.at == "["
    if in_list:
        window.step()
    more = window.at != "]" if in_list else bool(window.at)
    while more:
        yield window.value()
        more = window.at == "," if in_list else bool(window.at)
        if in_list and more:
            window.step()
    if in_list:
        if window.at != "]":
            raise window.unexpected("expected a comma or the end of the list")
        window.step()
    if window.at:
        raise window.unexpected("expected nothing after the end of the list")


@final
class _Window:
    """The part of the file that is held: `text`, and in it the place `here` of what comes next."""

    def __init__(self, pieces: Iterator[str], here: Place) -> None:
        self._pieces = pieces
        self._text = ""
        self._here = here
        self._done = False
        self._failure: DataError | None = None
        self._skip()

    @property
    def at(self) -> str:
        """The next character that is no white space; empty at the end."""
        return self._text[self._here.offset : self._here.offset + 1]

    def step(self) -> None:
        """Pass one character and the white space behind it."""
        self._here = self._here.moved(self._text, self._here.offset + 1)
        self._skip()

    def value(self) -> Element | DataError:
        """The value that comes next, or what is wrong with it where the next one can still be found."""
        while True:
            failure: DataError | None = None
            value: object = None
            start = self._here
            try:
                value, found = parse_at(self._text, start.offset, start)
                end: int | None = found
            except DataError as error:
                failure, end = error, skip_value(self._text, start.offset)
            cut = end is None or end == len(self._text)
            if cut and not self._done and len(self._text) - start.offset <= MAX_VALUE:
                self._grow()
                continue
            if end is None:
                raise self._ended(failure)
            # Enough is held at once that a value can be longer than allowed and yet end in it.
            source = "" if end - start.offset > MAX_VALUE else self._text[start.offset : end]
            failure = failure if source else _too_long(start)
            self._here = start.moved(self._text, end)
            self._skip()
            return failure or Element(value, Place(start.name, start.line, start.column), source)

    def unexpected(self, allowed: str) -> DataError:
        """The error for what comes next."""
        offset = self._here.offset
        came = excerpt(self._text[offset : offset + EXCERPT + 1]) if self.at else "the file ends too early"
        return _last(came, allowed, "", self._here.at(self._text, offset))

    def _ended(self, failure: DataError | None) -> DataError:
        """The error for a value without an end."""
        if failure is None or len(self._text) - self._here.offset > MAX_VALUE:
            error = _too_long(self._here)
            return _last(error.received, error.allowed, error.do, error.where)
        return _last(failure.received, failure.allowed, failure.do, failure.where)

    def _skip(self) -> None:
        while True:
            offset = skip_space(self._text, self._here.offset)
            self._here = self._here.moved(self._text, offset)
            if offset < len(self._text) or self._done:
                return
            self._grow()

    def _grow(self) -> None:
        """Let go of what is done with and read at least as much again, or up to the end of the file."""
        if self._failure is not None:
            raise self._failure
        here = self._here
        held = [self._text[here.offset :]]
        self._here = Place(here.name, here.line, here.column)
        wanted, size = max(len(held[0]), 1), 0
        try:
            while size < wanted and not self._done:
                piece = next(self._pieces, None)
                self._done = piece is None
                held.append(piece or "")
                size += len(held[-1])
        except DataError as failure:
            # What was read before the damage still counts.
            self._failure = failure
            if not size:
                raise
        self._text = "".join(held)


def _too_long(start: Place) -> DataError:
    where = f"{start.name}:{start.line}:{start.column}"
    return DataError(f"a value longer than {MAX_VALUE:,} characters", allowed="one row", where=where)


def _last(received: str, allowed: str, do: str, where: str) -> DataError:
    return DataError(f"{received}; nothing after it was read", allowed=allowed, do=do, where=where)
