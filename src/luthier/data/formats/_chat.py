"""Turns of a conversation, in the two dialects of the field (`role`/`content` and `from`/`value`), and tools.

What cannot be kept is refused: a message with reasoning or an image beside its text would lose them silently.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from luthier.core.nearest import nearest
from luthier.data.conversation import Conversation, Message, Role, ToolCall
from luthier.data.formats._fields import (
    FieldError,
    Path,
    dotted,
    filled,
    is_list,
    json_at,
    kind_of,
    shown,
    text_at,
)

ROLE_NAMES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""Every role name of the field, and the role it stands for."""
MESSAGE_ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = ("human", "gpt", "system", "function_call", "observation", "tool")
HOMELESS = ("reasoning_content", "reasoning", "thinking", "images", "audio", "refusal")


def conversation(messages: Sequence[Message], path: Path, where: str, *, tools: object = None) -> Conversation:
    """Messages as a conversation that has at least one answer to learn, with the tools of the row."""
    if not any(message.role == "assistant" for message in messages):
        raise FieldError(
            f"{dotted(path)} has no assistant message", path=path, allowed="expected an answer to learn", where=where
        )
    return Conversation(tuple(messages), read_tools(tools, ("tools",), where))


def exchange(prompt: object, answer: object, paths: tuple[Path, Path], where: str, *, system: object) -> Conversation:
    """A prompt and its answer, each a string, a message or a list of messages, after an optional system message."""
    asked = turns_or_text(prompt, paths[0], where, role="user", what="the prompt")
    answered = turns_or_text(answer, paths[1], where, role="assistant", what="the answer")
    if answered[-1].role != "assistant":
        raise FieldError(
            f"{dotted(paths[1])} ends with a {answered[-1].role} message",
            path=paths[1],
            allowed="expected an assistant message",
            where=where,
        )
    return conversation([*system_message(system, ("system",), where), *asked, *answered], paths[1], where)


def system_message(value: object, path: Path, where: str) -> list[Message]:
    """The system message of a column; none when the column is absent or blank."""
    if value is None:
        return []
    text = text_at(value, path, where)
    return [Message("system", text)] if text.strip() else []


def turns_or_text(value: object, path: Path, where: str, *, role: Role, what: str) -> list[Message]:
    """A string as a message of `role`, a message, or a list of messages."""
    if isinstance(value, str):
        return [Message(role, filled(value, path, where, what=what))]
    if isinstance(value, Mapping):
        return [read_turn(value, path, where, expected=MESSAGE_ROLES)]
    if is_list(value):
        return read_turns(value, path, where, expected=MESSAGE_ROLES)
    return [Message(role, filled(value, path, where, what=what))]


def read_turns(value: object, path: Path, where: str, *, expected: tuple[str, ...]) -> list[Message]:
    """A list of turns, or a string that holds one as JSON; `expected` are the roles that an error names."""
    turns = json_at(value, path, where) if isinstance(value, str) else value
    if not is_list(turns):
        raise FieldError(
            f"{dotted(path)} is {kind_of(turns)}", path=path, allowed="expected a list of messages", where=where
        )
    if not turns:
        raise FieldError(f"{dotted(path)} is an empty list", path=path, allowed="expected messages", where=where)
    return [read_turn(turn, (*path, index), where, expected=expected) for index, turn in enumerate(turns)]


def read_turn(turn: object, path: Path, where: str, *, expected: tuple[str, ...]) -> Message:
    """One turn in either dialect."""
    if not isinstance(turn, Mapping):
        raise FieldError(
            f"{dotted(path)} is {kind_of(turn)}", path=path, allowed="expected a message object", where=where
        )
    role_key = _first(turn, ("role", "from"))
    content_key = _first(turn, ("content", "value"))
    if role_key is None:
        raise FieldError(
            f"{dotted(path)} has no role", path=path, allowed=f"expected {' | '.join(expected)}", where=where
        )
    name = text_at(turn[role_key], (*path, role_key), where)
    role = _role(name, (*path, role_key), where, expected=expected)
    for key in HOMELESS:
        if turn.get(key):
            raise FieldError(
                f"{dotted((*path, key))} holds {kind_of(turn[key])} that a message has no place for",
                path=(*path, key),
                do="put its text into the content, or remove the key",
                where=where,
            )
    content_path = (*path, content_key or "content")
    value = turn[content_key] if content_key else None
    if name == "function_call":
        calls = _sharegpt_calls(value, content_path, where)
        return Message("assistant", "", _weight(turn, path, where), calls)
    calls = _calls(turn, path, where)
    if role != "assistant" and calls:
        raise FieldError(
            f"{dotted(path)} calls a tool as {name}", path=path, allowed="expected role assistant", where=where
        )
    text = "" if value is None and calls else _content(value, content_path, where)
    if role == "assistant" and not text.strip() and not calls:
        raise FieldError(
            f"the answer is empty ({dotted(content_path)})", path=content_path, allowed="expected text", where=where
        )
    who = "" if turn.get("name") is None else text_at(turn["name"], (*path, "name"), where)
    return Message(role, text, _weight(turn, path, where), calls, who)


def _first(turn: Mapping[str, object], keys: tuple[str, ...]) -> str | None:
    # Parquet fills absent keys with null, so a key that holds something goes first.
    present = [key for key in keys if key in turn]
    return next((key for key in present if turn[key] is not None), present[0] if present else None)


def _role(name: str, path: Path, where: str, *, expected: tuple[str, ...]) -> Role:
    role = ROLE_NAMES.get(name)
    if role is None:
        close = nearest(name[:SHORT], expected, count=1)
        raise FieldError(
            f"{dotted(path)} is {shown(name)}",
            path=path,
            allowed=f"expected {' | '.join(expected)}",
            do=f"did you mean {close[0]}?" if close else "",
            where=where,
        )
    return role


SHORT = 40
"""Comparing longer words with role names would only take time."""


def _content(value: object, path: Path, where: str) -> str:
    """A string, or the text parts of a message joined."""
    if not is_list(value):
        return text_at(value, path, where)
    pieces: list[str] = []
    for index, part in enumerate(value):
        place = (*path, index)
        if isinstance(part, str):
            pieces.append(part)
            continue
        if not isinstance(part, Mapping):
            raise FieldError(
                f"{dotted(place)} is {kind_of(part)}", path=place, allowed="expected a text part", where=where
            )
        if part.get("type", "text") != "text":
            raise FieldError(
                f"{dotted((*place, 'type'))} is {shown(part['type'])}",
                path=(*place, "type"),
                allowed='expected "text"',
                where=where,
            )
        pieces.append(text_at(part.get("text"), (*place, "text"), where))
    return "".join(pieces)


def _weight(turn: Mapping[str, object], path: Path, where: str) -> float | None:
    """The loss weight of a turn: `weight`, or the true or false that other tools write as `train` or `loss`."""
    for key in ("train", "loss"):
        if isinstance(turn.get(key), bool) and turn.get("weight") is None:
            return 1.0 if turn[key] else 0.0
    value = turn.get("weight")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        came = str(value) if isinstance(value, float) else shown(value)
        if isinstance(value, int) and not isinstance(value, bool):
            came = "negative"
        raise FieldError(
            f"{dotted((*path, 'weight'))} is {came}",
            path=(*path, "weight"),
            allowed="expected a finite number that is 0 or more",
            where=where,
        )
    return float(value)


def _calls(turn: Mapping[str, object], path: Path, where: str) -> tuple[ToolCall, ...]:
    """The calls of a message: `tool_calls`, or the single `function_call` of older files."""
    if turn.get("function_call") is not None:
        return (_call(turn["function_call"], (*path, "function_call"), where),)
    value = turn.get("tool_calls")
    if value is None:
        return ()
    place = (*path, "tool_calls")
    if not is_list(value):
        raise FieldError(f"{dotted(place)} is {kind_of(value)}", path=place, allowed="expected a list", where=where)
    return tuple(_call(call, (*place, index), where) for index, call in enumerate(value))


def _sharegpt_calls(value: object, path: Path, where: str) -> tuple[ToolCall, ...]:
    decoded = json_at(filled(value, path, where, what="the call"), path, where) if isinstance(value, str) else value
    calls = decoded if is_list(decoded) else [decoded]
    if not calls:
        raise FieldError(f"{dotted(path)} holds no call", path=path, allowed="expected a call", where=where)
    return tuple(_call(call, path, where) for call in calls)


def _call(value: object, path: Path, where: str) -> ToolCall:
    """A call as `{"id", "function": {"name", "arguments"}}` or bare `{"name", "arguments"}`."""
    inner = value.get("function", value) if isinstance(value, Mapping) else value
    if not isinstance(value, Mapping) or not isinstance(inner, Mapping):
        raise FieldError(
            f"{dotted(path)} is {kind_of(inner)}",
            path=path,
            allowed='expected {"name": ..., "arguments": {...}}',
            where=where,
        )
    name = filled(inner.get("name"), (*path, "name"), where, what="the name of the function")
    place = (*path, "arguments")
    arguments: Any = inner.get("arguments")
    if isinstance(arguments, str):
        arguments = json_at(arguments, place, where) if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise FieldError(
            f"{dotted(place)} is {kind_of(arguments)}", path=place, allowed="expected an object", where=where
        )
    call_id = value.get("id")
    return ToolCall(name, arguments, "" if call_id is None else text_at(call_id, (*path, "id"), where))


def read_tools(value: object, path: Path, where: str) -> tuple[Mapping[str, Any], ...]:
    """The tools of a row, a list or a string that holds one; a bare schema is wrapped as OpenAI writes it."""
    if isinstance(value, str):
        value = json_at(value, path, where) if value.strip() else None
    if value is None:
        return ()
    if not is_list(value):
        raise FieldError(
            f"{dotted(path)} is {kind_of(value)}", path=path, allowed="expected a list of tools", where=where
        )
    tools: list[Mapping[str, Any]] = []
    for index, tool in enumerate(value):
        place = (*path, index)
        if not isinstance(tool, Mapping):
            raise FieldError(
                f"{dotted(place)} is {kind_of(tool)}", path=place, allowed="expected a tool object", where=where
            )
        tools.append(tool if "function" in tool else {"type": "function", "function": tool})
    return tuple(tools)
