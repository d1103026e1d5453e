"""Messages as a template can show them: what it has no place for becomes text, and somebody is told.

Use through the renderers, before anything is rendered.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from luthier.core.errors import DataError
from luthier.data.conversation import Conversation, Message, Role, ToolCall
from luthier.data.rendering.template import Template


class Notice(Protocol):
    """Hears of something that a user should know, in words that are the same for every row, with one row's example."""

    def __call__(self, text: str, example: str = "") -> None: ...


@dataclass(frozen=True, slots=True)
class Shown:
    """A message as the template gets it, whose words it is, and the loss weight its row gives it."""

    fields: dict[str, Any]
    role: Role
    weight: float | None


def show(conversation: Conversation, template: Template, notice: Notice) -> list[Shown]:
    """The messages as `template` can show them; what it has no place for becomes text, with a notice."""
    if conversation.tools and not template.knows_tools:
        notice("tools on offer are not shown: the template has no place for them")
    shown: list[Shown] = []
    open_calls: list[str] = []
    for message in conversation.messages:
        if message.weight is not None and not 0 <= message.weight < float("inf"):
            raise DataError(f"a message has weight {message.weight}", allowed="0 or a positive number")
        fields: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.name:
            fields["name"] = message.name
        if message.tool_calls:
            open_calls = [call.id for call in message.tool_calls]
            if template.knows_calls:
                fields["tool_calls"] = [call_fields(call) for call in message.tool_calls]
            else:
                notice("tool calls are written as JSON in the answer: the template does not know them")
                fields["content"] = _calls_as_text(message)
        if message.role == "tool":
            if template.knows_results:
                if open_calls and (call_id := open_calls.pop(0)):
                    fields["tool_call_id"] = call_id
            else:
                notice("tool results are shown as user messages: the template does not know them")
                fields["role"] = "user"
                if shown and shown[-1].role == "tool":
                    # Templates that want strict alternation take one user message where several tools answered.
                    before = shown.pop()
                    fields["content"] = f"{before.fields['content']}\n{message.content}"
        shown.append(Shown(fields, message.role, message.weight))
    return shown


def turn_weights(shown: Sequence[Shown], *, last: bool) -> dict[int, float]:
    """The trained turns and their weights; a weight in the row goes before what is trained otherwise, all or the last.
    """
    answers = [index for index, message in enumerate(shown) if message.role == "assistant"]
    weights: dict[int, float] = {}
    for index in answers:
        own = shown[index].weight
        weight = (0.0 if last and index != answers[-1] else 1.0) if own is None else own
        if weight > 0:
            weights[index] = weight
    return weights


def call_fields(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": dict(call.arguments)}
    fields: dict[str, Any] = {"type": "function", "function": function}
    return {**fields, "id": call.id} if call.id else fields


def _calls_as_text(message: Message) -> str:
    calls = [
        json.dumps({"name": call.name, "arguments": dict(call.arguments)}, ensure_ascii=False)
        for call in message.tool_calls
    ]
    return "\n".join([*([message.content] if message.content else []), *calls])
