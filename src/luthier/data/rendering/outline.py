"""Outlines: what a template writes around the contents of a conversation, kept for all conversations of one shape.

Idea: rows of a data set are shaped alike (the same roles in the same order, the same tools), and most templates write
the same around their contents, whatever these say. For a shape that comes again the template is asked once, with its
contents left open; where it answers, the proof (`symbolic.py`) is that it did nothing with a content that depends on
what it says, but for premises that are looked at for each row. The renderings of such a row are joins of texts; those
of all other rows, and renderings without an outline, come from the template as ever.

Use through `Renderer.foresee`. Not when a conversation is rendered once: two renderings of it cost less.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, final

from luthier.core.errors import TemplateError
from luthier.data.rendering.template import Template, Wanted
from luthier.data.rendering.turns import Place, Stage

_MOST_SHAPES: Final = 4096
"""Shapes that are remembered; then it begins anew."""
_LONGEST: Final = 2**20
"""Characters of a rendering that is joined here. The template has a limit of its own, which longer ones may reach."""

Asked = tuple[Stage, Place, Wanted]


@final
@dataclass(frozen=True, slots=True)
class Part:
    """The content of a message, stripped in this order of what is at its sides."""

    message: int
    strips: tuple[tuple[str, str | None], ...]

    def of(self, contents: Sequence[str]) -> str:
        text = contents[self.message]
        for side, characters in self.strips:
            text = _STRIPS[side](text, characters)
        return text


_STRIPS: Final = {"strip": str.strip, "lstrip": str.lstrip, "rstrip": str.rstrip}


@final
@dataclass(frozen=True, slots=True)
class Shape:
    """The outlines of a shape: literals and places in `parts`; None for a rendering that the template has to make.

    Messages of `filled` are not blank, those of `lacks` do not hold a text: what the outlines are proved for.
    """

    parts: tuple[Part, ...]
    outlines: tuple[tuple[Place, tuple[str | int, ...] | None], ...]
    filled: frozenset[int]
    lacks: frozenset[tuple[int, str]]

    def holds(self, contents: Sequence[str]) -> bool:
        """Whether a row of this shape is as its outlines suppose."""
        for message in self.filled:
            if not contents[message].strip():
                return False
        return not any(needle in contents[message] for message, needle in self.lacks)

    def fill(self, stage: Stage) -> list[Place]:
        """Hand a row its renderings. Returns those it still needs."""
        contents = stage.contents
        texts = [part.of(contents) for part in self.parts]
        missing: list[Place] = []
        for place, pieces in self.outlines:
            if pieces is None:
                missing.append(place)
                continue
            text = "".join([texts[piece] if piece.__class__ is int else piece for piece in pieces])  # type: ignore[misc]
            if len(text) > _LONGEST:
                missing.append(place)
            else:
                stage.take(place, text)
        return missing


@final
class Outlines:
    """The shapes of one template's conversations seen so far."""

    def __init__(self, template: Template) -> None:
        self._template = template
        self._known: dict[Hashable, Shape | None] = {}

    def give(self, stages: Iterable[Stage]) -> list[Asked]:
        """Hand these conversations all renderings that are outlined. Returns those the template has to be asked for."""
        foreseen = [(stage, self._key(stage)) for stage in stages if stage.foreseeable]
        self._learn(foreseen)
        asked: list[Asked] = []
        for stage, key in foreseen:
            shape = self._known.get(key)
            if shape is None or not shape.holds(stage.contents):
                asked += [(stage, place, wanted) for place, wanted in stage.foreseen()]
            elif missing := shape.fill(stage):
                asked += [(stage, place, wanted) for place, wanted in stage.foreseen() if place in missing]
        return asked

    def shape_of(self, stage: Stage) -> Shape | None:
        """The outlines of a conversation's shape, where they are known."""
        return self._known.get(self._key(stage)) if stage.foreseeable else None

    def _key(self, stage: Stage) -> Hashable:
        """The shape of a conversation; None where it holds what cannot be written, which the template will say."""
        try:
            return stage.shape(tools=self._template.knows_tools)
        except (RecursionError, ValueError, TypeError):
            return None

    def _learn(self, foreseen: Sequence[tuple[Stage, Hashable]]) -> None:
        """Ask for the outlines of each shape that comes for the second time."""
        if len(self._known) > _MOST_SHAPES:
            self._known.clear()
        new: dict[Hashable, Stage] = {}
        for stage, key in foreseen:
            if key is None:
                continue
            if key not in self._known:
                self._known[key] = None
            elif self._known[key] is None:
                new.setdefault(key, stage)
        opened = [stage.opened() for stage in new.values()]
        try:
            made = iter(self._template.outlines([wanted for each in opened for _, wanted in each]) if opened else ())
        except TemplateError:  # said of the row itself when its turn comes
            return
        for key, each in zip(new, opened, strict=True):
            self._known[key] = _shape([place for place, _ in each], [next(made) for _ in each])


def _shape(places: Sequence[Place], made: Sequence[str | None]) -> Shape:
    parts: dict[Part, int] = {}
    outlines: list[tuple[str | int, ...] | None] = []
    filled: set[int] = set()
    lacks: set[tuple[int, str]] = set()
    for answer in made:
        if answer is None:
            outlines.append(None)
            continue
        found = json.loads(answer)
        pieces: list[str | int] = []
        for piece in found["pieces"]:
            if isinstance(piece, str):
                pieces.append(piece)
            else:
                message, strips = piece
                part = Part(message, tuple((side, characters) for side, characters in strips))
                pieces.append(parts.setdefault(part, len(parts)))
        outlines.append(tuple(pieces))
        filled.update(found["filled"])
        lacks.update((message, needle) for message, needle in found["lacks"])
    return Shape(tuple(parts), tuple(zip(places, outlines, strict=True)), frozenset(filled), frozenset(lacks))
