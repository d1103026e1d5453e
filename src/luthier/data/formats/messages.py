"""Messages: a list of turns with `role` and `content`, as chat interfaces exchange them.

`weight: 0` masks a turn; `content` may be a list of text parts; an assistant turn may call tools instead of speaking.
Source: the chat fine-tuning format of OpenAI; ChatML data sets use the same keys.
Use when: rows are conversations. It is the format to write new data in.
"""

from __future__ import annotations

from typing import ClassVar, final

from luthier.data.conversation import Conversation, Meaning
from luthier.data.formats import Format, Values
from luthier.data.formats._chat import MESSAGE_ROLES, conversation, read_turns
from luthier.data.formats._fields import column, is_preference


@final
class Messages(Format):
    """`{"messages": [{"role", "content"}], "tools"}`."""

    meaning: ClassVar[Meaning] = "conversation"
    title: ClassVar[str] = "chat messages"
    specificity: ClassVar[int] = 60
    example: ClassVar[str] = (
        '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}'
    )
    known: ClassVar[tuple[str, ...]] = ("messages", "tools")

    def looks_like(self, record_values: Values) -> bool:
        return "messages" in record_values and not is_preference(record_values)

    def columns(self, values: Values) -> tuple[str, ...]:
        return tuple(name for name in self.known if name in values)

    def read(self, values: Values, where: str) -> Conversation:
        turns = read_turns(column(values, "messages", where), ("messages",), where, expected=MESSAGE_ROLES)
        return conversation(turns, ("messages",), where, tools=values.get("tools"))
