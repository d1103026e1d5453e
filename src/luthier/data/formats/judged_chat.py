"""Judged conversations: turns of which the last is the answer, and whether that answer is good.

Source: LLaMA-Factory, data/README.md, "KTO dataset": `conversations` or `messages`, and `kto_tag`.
Use when: whole conversations were judged, a thumb up or down under their last answer.
"""

from __future__ import annotations

from typing import ClassVar, final

from luthier.data.conversation import Judged, Meaning
from luthier.data.formats import Format, Values
from luthier.data.formats._chat import MESSAGE_ROLES, read_tools, read_turns, system_message
from luthier.data.formats._compared import conversation_so_far, good_or_bad, said
from luthier.data.formats._fields import column, is_preference, pick

TURNS = ("messages", "conversations")
LABELS = ("kto_tag", "label", "good", "desirable")


@final
class JudgedChat(Format):
    """`{"messages": [...], "label": true or false}`, or `conversations` and `kto_tag`."""

    meaning: ClassVar[Meaning] = "judged"
    title: ClassVar[str] = "conversations judged good or bad"
    specificity: ClassVar[int] = 56
    example: ClassVar[str] = (
        '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}], "label": true}'
    )
    known: ClassVar[tuple[str, ...]] = (*TURNS, *LABELS, "system", "tools")

    def looks_like(self, record_values: Values) -> bool:
        parts = (TURNS, LABELS)
        return all(pick(record_values, names) is not None for names in parts) and not is_preference(record_values)

    def columns(self, values: Values) -> tuple[str, ...]:
        names = (pick(values, TURNS), pick(values, LABELS), *(name for name in ("system", "tools") if name in values))
        return tuple(name for name in names if name is not None)

    def read(self, values: Values, where: str) -> Judged:
        name, label = pick(values, TURNS) or TURNS[0], pick(values, LABELS) or LABELS[0]
        turns = read_turns(column(values, name, where), (name,), where, expected=MESSAGE_ROLES)
        turns = [*system_message(values.get("system"), ("system",), where), *turns]
        tools = read_tools(values.get("tools"), ("tools",), where)
        asked = conversation_so_far(turns[:-1], (name,), where, tools=tools)
        good = good_or_bad(column(values, label, where), (label,), where)
        return Judged(asked, said(turns[-1:], (name,), where), good)
