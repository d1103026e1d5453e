"""Layouts: where the turns of a conversation stand in its text, known at once for all conversations of one shape.

Idea: where outlines (`outline.py`) prove what a template writes around contents, they prove too where each content
stands: a place in the text is a number of literal characters and the lengths of the contents before it. So what
`turns.py` finds out for each conversation, by comparing its renderings, is found out once for the shape, by comparing
outlines; a row is then one join and a few additions. A shape has no layout unless that comparison ends as it does for
nearly all: one view, prompts that begin their answers, nothing but white space between a prompt and its answer.

Use through the renderer of causal decoders. Not for rows with tools or names: their shapes seldom come again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final, final

from luthier.data.conversation import Conversation
from luthier.data.rendering.outline import Outlines, Shape
from luthier.data.rendering.rendered import TOKEN_ROLES
from luthier.data.rendering.shown import Shown
from luthier.data.rendering.turns import PROBES, Stage
from luthier.data.tokenizer import Tokenizer

LONGEST: Final = 2**16
"""Characters of a text that is laid out here; longer ones are rare, and are looked at by themselves."""

_MOST: Final = 4096
"""Shapes that are remembered; then it begins anew."""

_TRIM: Final = (("strip", None),)
"""What templates do to a content where they do anything."""
Pieces = Sequence[str | int]
"""Literals, and places among the parts of a shape."""
Key = tuple[tuple[str, float | None, bool], ...]
"""The shape of a plain conversation: of each message its role, its weight, and whether it says anything."""


def key_of(conversation: Conversation) -> Key | None:
    """The shape of a conversation; None where it holds more than what roles say."""
    if conversation.tools:
        return None
    messages = conversation.messages
    for message in messages:
        if message.tool_calls or message.name or message.role == "tool":
            return None
    return tuple([(message.role, message.weight, not message.content) for message in messages])


@final
@dataclass(frozen=True, slots=True)
class Turn:
    """A trained turn: the message, what stands between its prompt and its content, and its loss weight."""

    message: int
    part: int
    lead: str
    weight: float


@final
@dataclass(frozen=True, slots=True)
class Filled:
    """The text of a conversation. `places` are where its messages end, then three for each of its turns: where it
    starts, where what it says ends, and where what the template writes behind that ends."""

    layout: Layout
    contents: Sequence[str]
    text: str
    places: Sequence[int]
    trimmed: Sequence[int]
    """Messages of turns whose white space is not there."""


@final
@dataclass(frozen=True, slots=True)
class Layout:
    """Where things stand in the texts of one shape; a place is literal characters and the first so many of `order`."""

    shape: Shape
    form: str
    order: tuple[int, ...]
    places: tuple[tuple[int, int], ...]
    roles: bytes
    turns: tuple[Turn, ...]

    @classmethod
    def of(cls, shape: Shape, shown: Sequence[Shown], weights: Mapping[int, float]) -> Layout | None:
        """The layout of a shape whose messages of `weights` are trained; None where it is not as nearly all are."""
        outlines = dict(shape.outlines)
        texts = [outlines.get(("text", count)) for count in range(1, len(shown) + 1)]
        whole = texts[-1] if texts else None
        if whole is None or not weights:
            return None
        nexts: list[Pieces] = []
        for one, two in zip(texts, [*texts[1:], whole], strict=True):
            if one is None or two is None or _behind(one, two) is None:
                return None
            nexts.append(one)
        ends: list[Pieces] = list(nexts)
        turns: list[Turn] = []
        for index, weight in weights.items():
            found = _turn(shape, index, weight, nexts[index])
            if found is None:
                return None
            turn, edges = found
            turns.append(turn)
            ends += edges
        order = tuple(piece for piece in whole if isinstance(piece, int))
        form = "".join("%s" if isinstance(piece, int) else piece.replace("%", "%%") for piece in whole)
        places = tuple((sum(len(each) for each in end if isinstance(each, str)), _parts(end)) for end in ends)
        roles = bytes(TOKEN_ROLES.index(message.role) for message in shown)
        return cls(shape, form, order, places, roles, tuple(turns))

    def fill(self, contents: Sequence[str]) -> Filled | None:
        """The text of a conversation that says this; None where it is not as the layout supposes, or is too long."""
        if not self.shape.holds(contents):
            return None
        parts = [
            contents[part.message].strip() if part.strips == _TRIM else part.of(contents) for part in self.shape.parts
        ]
        said = tuple([parts[place] for place in self.order])
        text = self.form % said
        if len(text) > LONGEST:
            return None
        sizes = [0, *accumulate(map(len, said))]
        trimmed = [
            turn.message
            for turn in self.turns
            if len(parts[turn.part]) < len(contents[turn.message])
            and contents[turn.message] not in turn.lead + parts[turn.part]
        ]
        return Filled(self, contents, text, [literal + sizes[count] for literal, count in self.places], trimmed)


@final
class Layouts:
    """The layouts of one renderer's conversations."""

    def __init__(self, tokenizer: Tokenizer, outlines: Outlines) -> None:
        self._specials = tokenizer.specials
        self._outlines = outlines
        self._known: dict[Key, Layout | None] = {}
        bos = tokenizer.bos_id if tokenizer.adds_bos else None
        # That no message holds BOS is told by its text, which has to be one of those that are looked for.
        self._may_learn = bos is None or tokenizer.decode([bos]) in tokenizer.specials.texts

    def fill(self, conversation: Conversation) -> Filled | None:
        """The text of a conversation whose shape has a layout, and which holds no control token."""
        key = key_of(conversation) if self._known else None
        layout = None if key is None else self._known.get(key)
        if layout is None:
            return None
        contents = [message.content for message in conversation.messages]
        for content in contents:
            if self._specials.within(content):
                return None
        return layout.fill(contents)

    def learn(self, conversation: Conversation, stage: Stage) -> None:
        """See whether the shape of a conversation has a layout, once its outlines are known."""
        key = key_of(conversation) if self._may_learn else None
        shape = None if key is None or key in self._known else self._outlines.shape_of(stage)
        if key is None or shape is None:
            return
        if len(self._known) >= _MOST:
            self._known.clear()
        self._known[key] = Layout.of(shape, stage.shown, stage.weights)


def _turn(shape: Shape, index: int, weight: float, text: Pieces) -> tuple[Turn, tuple[Pieces, Pieces, Pieces]] | None:
    """The turn of message `index`, whose rendering as the last one is `text`, and where it stands: the pieces up to
    its start, its end, and the end of what follows."""
    outlines = dict(shape.outlines)
    prompt = outlines.get(("prompt", index))
    own = [place for place, piece in enumerate(text) if isinstance(piece, int) and shape.parts[piece].message == index]
    if prompt is None or len(own) != 1:
        return None
    opening, ending = text[: own[0]], text[own[0] + 1 :]
    for probe in PROBES:
        # That the content stands where the probes do is what its place is proved by.
        if outlines.get((probe, index)) != _merged([*opening, probe, *ending]):
            return None
    between = _behind(prompt, opening)
    if between is None or any(isinstance(piece, int) for piece in (*between, *ending)):
        return None
    lead = "".join(map(str, between))
    if lead.strip():
        return None
    part = text[own[0]]
    return Turn(index, int(part), lead, weight), (prompt, text[: own[0] + 1], text)


def _behind(start: Pieces, whole: Pieces) -> Pieces | None:
    """What stands behind `start` in `whole`; None where that does not begin so, whatever the contents say."""
    if not start:
        return whole
    last, count = start[-1], len(start)
    if len(whole) < count or list(start[:-1]) != list(whole[: count - 1]):
        return None
    edge = whole[count - 1]
    if edge == last:
        return whole[count:]
    if isinstance(last, str) and isinstance(edge, str) and edge.startswith(last):
        return [edge[len(last) :], *whole[count:]]
    return None


def _merged(pieces: Pieces) -> tuple[str | int, ...]:
    """The pieces, with literals beside each other joined."""
    made: list[str | int] = []
    for piece in pieces:
        if isinstance(piece, str) and made and isinstance(made[-1], str):
            made[-1] += piece
        elif piece != "":
            made.append(piece)
    return tuple(made)


def _parts(pieces: Pieces) -> int:
    return sum(isinstance(piece, int) for piece in pieces)
