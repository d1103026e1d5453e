"""Tool calls in what a model says: `<tool_call>{"name": ..., "arguments": ...}</tool_call>`, as of Hermes and Qwen.

Text goes through as it comes, but for what may be the beginning of a call, which is held until that is known. A call
that is no JSON of that form stays text: nothing that was said is lost. The server tells calls in streams, and an
environment hears a whole answer as one message (`message_said`).
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Any, Final, final

from luthier.data.conversation import Message, ToolCall

OPEN: Final = "<tool_call>"
CLOSE: Final = "</tool_call>"


@final
@dataclass(frozen=True)
class Called:
    """A function that the model wants to be called; `arguments` is JSON text."""

    name: str
    arguments: str
    id: str

    def as_plain(self, index: int | None = None) -> dict[str, Any]:
        """As the API tells it; streams number their calls."""
        function = {"name": self.name, "arguments": self.arguments}
        numbered = {} if index is None else {"index": index}
        return {**numbered, "id": self.id, "type": "function", "function": function}


@final
class CallReader:
    """Takes text as it grows, and gives text and calls in order.

    `forced`: the whole text is one call, as JSON. `single` leaves out all calls after the first.
    """

    def __init__(self, *, forced: bool = False, single: bool = False) -> None:
        self.calls = 0
        self._forced = forced
        self._single = single
        self._held = ""
        self._behind_call = False

    def push(self, text: str) -> list[str | Called]:
        """What is certain by now."""
        self._held += text
        found: list[str | Called] = []
        while not self._forced:
            if self._behind_call:
                # White space behind a call belongs to its form.
                self._held = self._held.lstrip()
                self._behind_call = not self._held
            start = self._held.find(OPEN)
            if start < 0:
                keep = max((n for n in range(1, len(OPEN)) if self._held.endswith(OPEN[:n])), default=0)
                cut = len(self._held) - keep
                found += [self._held[:cut]] * bool(cut)
                self._held = self._held[cut:]
                break
            end = self._held.find(CLOSE, start)
            found += [self._held[:start]] * bool(start)
            self._held = self._held[start:]
            if end < 0:
                break
            whole, self._held = self._held[: end - start + len(CLOSE)], self._held[end - start + len(CLOSE) :]
            piece = self._read(whole[len(OPEN) : -len(CLOSE)], whole)
            if isinstance(piece, Called):
                self._behind_call = True
                self.calls += 1
            if isinstance(piece, str) or self.calls == 1 or not self._single:
                found.append(piece)
        return found

    def end(self) -> list[str | Called]:
        """The rest, when no text comes any more."""
        held, self._held = self._held, ""
        if not held:
            return []
        # Some templates stop at the closing mark.
        piece = self._read(held if self._forced else held.removeprefix(OPEN), held)
        self.calls += isinstance(piece, Called)
        return [] if self._single and self.calls > 1 and isinstance(piece, Called) else [piece]

    def _read(self, text: str, whole: str) -> str | Called:
        try:
            said = json.loads(text)
        except ValueError:
            return whole
        if not isinstance(said, dict) or not isinstance(said.get("name"), str):
            return whole
        arguments = said.get("arguments", said.get("parameters", {}))
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return Called(said["name"], written, f"call_{secrets.token_hex(12)}")


def message_said(text: str) -> Message:
    """A whole answer as a message, with the calls that are in it; a call without an object of arguments is text."""
    reader, words = CallReader(), ""
    calls: list[ToolCall] = []
    for piece in [*reader.push(text), *reader.end()]:
        arguments = _arguments(piece) if isinstance(piece, Called) else None
        if isinstance(piece, Called) and arguments is not None:
            # Numbered, not drawn: templates write ids, and what is trained on has to come out the same again.
            calls.append(ToolCall(piece.name, arguments, f"call_{len(calls)}"))
        else:
            words += piece.arguments if isinstance(piece, Called) else piece
    return Message("assistant", words if calls else text, tool_calls=tuple(calls))


def _arguments(called: Called) -> dict[str, Any] | None:
    found = json.loads(called.arguments) if called.arguments.lstrip().startswith("{") else None
    return found if isinstance(found, dict) else None
