"""ShareGPT: a list of turns with `from` and `value`, spoken by human, gpt, function_call and observation.

The value of a `function_call` turn is JSON, one call or a list of calls; `system` and `tools` are columns of the row.
Source: the ShareGPT data sets, with the tool roles LLaMA-Factory added.
Use when: data comes from there; `role` and `content` are understood as keys, too.
"""

from __future__ import annotations

from typing import ClassVar, final

from luthier.data.conversation import Conversation, Meaning
from luthier.data.formats import Format, Values
from luthier.data.formats._chat import SHAREGPT_ROLES, conversation, read_turns, system_message
from luthier.data.formats._fields import column, is_preference

CONVERSATIONS = ("conversations",)


@final
class ShareGPT(Format):
    """`{"conversations": [{"from", "value"}], "system", "tools"}`."""

    meaning: ClassVar[Meaning] = "conversation"
    title: ClassVar[str] = "ShareGPT conversations"
    specificity: ClassVar[int] = 50
    example: ClassVar[str] = '{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}'
    known: ClassVar[tuple[str, ...]] = ("conversations", "system", "tools")

    def looks_like(self, record_values: Values) -> bool:
        return "conversations" in record_values and not is_preference(record_values)

    def columns(self, values: Values) -> tuple[str, ...]:
        return tuple(name for name in self.known if name in values)

    def read(self, values: Values, where: str) -> Conversation:
        value = column(values, "conversations", where)
        turns = read_turns(value, CONVERSATIONS, where, expected=SHAREGPT_ROLES)
        system = system_message(values.get("system"), ("system",), where)
        return conversation([*system, *turns], CONVERSATIONS, where, tools=values.get("tools"))
