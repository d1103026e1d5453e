"""Preference as LLaMA-Factory keeps it: turns with `from` and `value`, then a chosen and a rejected turn.

Source: LLaMA-Factory, data/README.md, "Preference dataset" in ShareGPT format.
Use when: data comes from there.
"""

from __future__ import annotations

from typing import ClassVar, final

from luthier.data.conversation import Meaning, Preference
from luthier.data.formats import Format, Values
from luthier.data.formats._chat import SHAREGPT_ROLES, read_tools, read_turns, system_message
from luthier.data.formats._compared import answer, conversation_so_far, preference, score_columns, scores_of_pair
from luthier.data.formats._fields import column, is_preference

CONVERSATIONS = ("conversations",)


@final
class ShareGPTPreference(Format):
    """`{"conversations": [{"from", "value"}], "chosen": {...}, "rejected": {...}}`."""

    meaning: ClassVar[Meaning] = "preference"
    title: ClassVar[str] = "ShareGPT conversations with a chosen and a rejected turn"
    specificity: ClassVar[int] = 64
    example: ClassVar[str] = (
        '{"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "Hello!"}, '
        '"rejected": {"from": "gpt", "value": "What?"}}'
    )
    known: ClassVar[tuple[str, ...]] = ("conversations", "chosen", "rejected", "system", "tools")

    def looks_like(self, record_values: Values) -> bool:
        return "conversations" in record_values and is_preference(record_values)

    def columns(self, values: Values) -> tuple[str, ...]:
        return (*(name for name in self.known if name in values), *score_columns(values))

    def read(self, values: Values, where: str) -> Preference:
        turns = read_turns(column(values, "conversations", where), CONVERSATIONS, where, expected=SHAREGPT_ROLES)
        before = system_message(values.get("system"), ("system",), where)
        tools = read_tools(values.get("tools"), ("tools",), where)
        asked = conversation_so_far([*before, *turns], CONVERSATIONS, where, tools=tools)
        answers = [answer(column(values, name, where), (name,), where) for name in ("chosen", "rejected")]
        return preference(asked, answers, ("rejected",), where, scores=scores_of_pair(values, where))
