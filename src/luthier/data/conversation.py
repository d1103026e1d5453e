"""What a row of a data file means: a conversation, or a text.

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


Content = Conversation | Text


@dataclass(frozen=True, slots=True)
class Row:
    """A row as read: its number in the file (0-based), where it stands (`file:line:column`), and what it means."""

    number: int
    where: str
    content: Content
