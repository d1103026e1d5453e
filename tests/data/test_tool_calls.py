"""An answer heard as a message: calls in it are calls, everything else is text. Streams are tested with the server."""

from __future__ import annotations

import json

import pytest

from luthier.data.tool_calls import message_said


def test_calls_are_heard_in_order_and_words_stay() -> None:
    """Breaks when a tool is never called in training, or what was said beside a call is lost."""
    calls = [f'<tool_call>{json.dumps({"name": "calculate", "arguments": {"expression": one}})}</tool_call>'
             for one in ("1+1", "2*3")]  # fmt: skip
    said = message_said(f"Let me see. {calls[0]}\n{calls[1]}")
    assert said.content == "Let me see. "
    assert [call.arguments["expression"] for call in said.tool_calls] == ["1+1", "2*3"]
    assert [call.id for call in said.tool_calls] == ["call_0", "call_1"], "what is drawn would not come out again"


@pytest.mark.parametrize("text", [
    "The answer is 4.", "", "<tool_call>no json</tool_call>", '<tool_call>{"arguments": {}}</tool_call>', "a < b",
    '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
])  # fmt: skip
def test_what_is_no_call_is_text(text: str) -> None:
    """Breaks when an answer that calls nothing loses words, or calls something."""
    said = message_said(text)
    assert not said.tool_calls and said.content == text
