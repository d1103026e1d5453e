"""Formats: what the columns of a row mean. One file a format; the folder is the registry.

A format recognises the columns of a row and turns the row into its meaning: a `Conversation`, a `Text`, or another
content of `conversation.py`. To add one, add a file with one class; its `specificity` decides where it stands when
several formats fit the same rows. Rows may be read in more than one way (a text with a label is a text, too), so only
formats are asked that give what is wanted.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

from luthier.core.errors import DataError, RecipeError
from luthier.core.nearest import did_you_mean, nearest
from luthier.data.conversation import WORDS, Content, Meaning

Values = Mapping[str, object]
SAMPLE = 20
"""How many rows at the head of a file decide on its format."""


class Format(ABC):
    """A shape of rows. Leaves are final and hold no state."""

    meaning: ClassVar[Meaning]
    """The kind of content that `read` gives."""
    title: ClassVar[str]
    specificity: ClassVar[int]
    """The highest fitting format wins."""
    example: ClassVar[str]
    """A row of this shape as JSON, for errors and help."""
    known: ClassVar[tuple[str, ...]]
    """The column names this format goes by; errors compare them with the columns they found."""

    @property
    def name(self) -> str:
        """The name a recipe uses: the name of the file."""
        return type(self).__module__.rpartition(".")[2]

    @abstractmethod
    def looks_like(self, record_values: Values) -> bool:
        """Whether a row has the columns of this format; it may still hold mistakes."""

    @abstractmethod
    def columns(self, values: Values) -> tuple[str, ...]:
        """The columns of this row that `read` uses."""

    @abstractmethod
    def read(self, values: Values, where: str) -> Content:
        """What the row means. Raises DataError with the path inside the row, what came and what is allowed."""


@dataclass(frozen=True, slots=True)
class Detection:
    """A format and the reason it was chosen."""

    format: Format
    why: str


@cache
def formats() -> tuple[Format, ...]:
    """Every format of this folder, the most specific first."""
    found: list[Format] = []
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        module = importlib.import_module(f"{__name__}.{path.stem}")
        kinds = [
            kind
            for kind in vars(module).values()
            if isinstance(kind, type) and issubclass(kind, Format) and kind.__module__ == module.__name__
        ]
        if len(kinds) != 1:
            raise RecipeError(f"{path.name} holds {len(kinds)} formats", allowed="exactly one format a file")
        found.append(kinds[0]())
    return tuple(sorted(found, key=lambda format: (-format.specificity, format.name)))


def named(name: str) -> Format:
    """The format called `name`. Raises RecipeError with the nearest names."""
    known = {format.name: format for format in formats()}
    if name not in known:
        raise RecipeError(f"{name!r} is no data format", do=did_you_mean(name, known))
    return known[name]


def mapped(columns: Mapping[str, str]) -> Format:
    """The format that an explicit mapping describes, such as `{prompt: COLUMN, answer: COLUMN}`."""
    from luthier.data.formats._mapped import Mapped

    return Mapped.checked(columns)


def detect(samples: Sequence[Values], *, wanted: Sequence[Meaning] = WORDS, where: str = "") -> Detection:
    """The most specific format that at least half of the first rows look like, among those that give what is `wanted`.

    Raises DataError that says what the rows are instead, or lists the columns found and the closest shapes, each with
    an example.
    """
    head = samples[:SAMPLE]
    for format in formats():
        hits = _hits(format, head) if format.meaning in wanted else []
        if hits:
            used = list(dict.fromkeys(column for values in hits for column in format.columns(values)))
            unused = sorted({column for values in hits for column in values} - set(used))
            why = f"{len(hits)} of the first {len(head)} rows have {', '.join(used)}"
            return Detection(format, why + (f"; not used: {', '.join(unused)}" if unused else ""))
    # A format without any specificity fits almost everything, so that it fits says nothing.
    other = next((format for format in formats() if format.specificity and _hits(format, head)), None)
    raise _unknown_shape(head, wanted, where) if other is None else unwanted(other, wanted, where=where)


def unwanted(format: Format, wanted: Sequence[Meaning], *, where: str) -> DataError:
    """The error for rows that mean something else than what is wanted."""
    fitting = [other for other in formats() if other.meaning in wanted]
    shapes = "".join(f"\n  {other.name}: {other.example}" for other in fitting)
    learn = (
        "choose an objective that compares answers (dpo, orpo, simpo, reward_model); to train on the chosen answers "
        "alone, set data.columns {prompt: ..., answer: chosen} in a recipe, --column prompt=... --column answer=chosen "
        "on the command line"
    )
    return DataError(
        f"the rows are read as {format.name} ({format.title}), which this work cannot use",
        allowed=f"rows of one of these shapes{shapes}\n",
        do=learn
        if format.meaning == "preference"
        else "choose an objective that learns from such rows, or name the columns to read: data.columns in a recipe, "
        "--column on the command line",
        where=where,
    )


def _hits(format: Format, head: Sequence[Values]) -> list[Values]:
    """The rows that look like the format, where they are at least half of them."""
    hits = [values for values in head if format.looks_like(values)]
    return hits if 2 * len(hits) >= len(head) else []


def _unknown_shape(head: Sequence[Values], wanted: Sequence[Meaning], where: str) -> DataError:
    found = sorted({str(column)[:40] for values in head for column in values})
    fitting = [format for format in formats() if format.meaning in wanted]
    closest = sorted(fitting, key=lambda format: -_closeness(format, found))[:3]
    shapes = "".join(f"\n  {format.name}: {format.example}" for format in closest)
    return DataError(
        f"no known format has the columns {', '.join(found[:20]) or '(none)'}",
        allowed=f"the closest shapes are{shapes}\n",
        do="these are preference pairs; name their prompt: data.columns {prompt: COLUMN, chosen: chosen, rejected: "
        "rejected}, or train on the chosen answers alone: {prompt: COLUMN, answer: chosen}"
        if {"chosen", "rejected"} <= set(found)
        else "or name your columns: data.columns {prompt: COLUMN, answer: COLUMN} or {text: COLUMN} in a recipe, "
        "--column prompt=COLUMN --column answer=COLUMN on the command line",
        where=where,
    )


def _closeness(format: Format, found: Sequence[str]) -> int:
    return sum(bool(nearest(column, format.known, count=1)) + (column in format.known) for column in found)
