"""What a row of a data file means: a conversation, a text, a text with its class, words with tags, a choice, answers
that were compared or judged, or only what is asked.

Formats turn rows into these; the renderer turns these into tokens. Nothing here knows files, templates or tokenizers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that an assistant message asks to run; `arguments` is the decoded JSON object."""

    name: str
    arguments: Mapping[str, Any]
    id: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `weight` scales the loss of an assistant turn; None leaves it to `train_on`, 0 masks the turn."""

    role: Role
    content: str
    weight: float | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    name: str = ""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order, and the tools (JSON schemas) that were on offer."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Text:
    """A document without roles, for continued pre-training."""

    text: str


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text, or a pair of texts, and the name of the one class it belongs to."""

    text: str
    label: str
    pair: str = ""


@dataclass(frozen=True, slots=True)
class Tagged:
    """The words of a text, and the name of the class of each."""

    words: tuple[str, ...]
    tags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Choices:
    """A question and several answers, of which the one at the place `right` is right."""

    prompt: str
    answers: tuple[str, ...]
    right: int


@dataclass(frozen=True, slots=True)
class Preference:
    """A conversation so far, and answers to it, the best first: two, or a ranking of more.

    `scores` say of each how good it is, in the same order; equal scores say that neither is better. Without them each
    answer is better than all that follow.
    """

    asked: Conversation
    answers: tuple[tuple[Message, ...], ...]
    scores: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Judged:
    """A conversation so far, an answer to it, and whether that is a good one."""

    asked: Conversation
    answer: tuple[Message, ...]
    good: bool


@dataclass(frozen=True, slots=True)
class Asked:
    """A conversation that waits for an answer, and the `facts` by which answers are checked: the row's other columns.

    Facts are what JSON can hold, such as the right result or tests. A prompt that the row writes as a text, and not as
    messages, is `text` too.
    """

    asked: Conversation
    facts: Mapping[str, Any]
    text: str | None = None


Content = Conversation | Text | Labelled | Tagged | Choices | Preference | Judged | Asked
Meaning = Literal["conversation", "text", "labelled", "tagged", "choices", "preference", "judged", "asked"]
"""The kinds of content by name: what a recipe may want its rows to be."""
WORDS: tuple[Meaning, ...] = ("conversation", "text")
"""What a language model learns to say."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row as read: its number in the file (0-based), where it stands (`file:line:column`), and what it means."""

    number: int
    where: str
    content: Content
