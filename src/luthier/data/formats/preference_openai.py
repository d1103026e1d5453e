"""Preference as OpenAI's fine-tuning service takes it: an input with messages, a preferred and a non-preferred output.

Source: OpenAI, Direct preference optimization (guide to fine-tuning): `input.messages`, `preferred_output`,
    `non_preferred_output`.
Use when: rows were made for that service.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, final

from luthier.data.conversation import Meaning, Preference
from luthier.data.formats import Format, Values
from luthier.data.formats._chat import MESSAGE_ROLES, read_tools, read_turns
from luthier.data.formats._compared import answer, conversation_so_far, preference
from luthier.data.formats._fields import FieldError, column, kind_of

BETTER, WORSE = "preferred_output", "non_preferred_output"
MESSAGES = ("input", "messages")


@final
class OpenAIPreference(Format):
    """`{"input": {"messages", "tools"}, "preferred_output": [...], "non_preferred_output": [...]}`."""

    meaning: ClassVar[Meaning] = "preference"
    title: ClassVar[str] = "preference pairs as OpenAI takes them"
    specificity: ClassVar[int] = 66
    example: ClassVar[str] = (
        '{"input": {"messages": [{"role": "user", "content": "Hi"}]}, '
        '"preferred_output": [{"role": "assistant", "content": "Hello!"}], '
        '"non_preferred_output": [{"role": "assistant", "content": "What?"}]}'
    )
    known: ClassVar[tuple[str, ...]] = ("input", BETTER, WORSE)

    def looks_like(self, record_values: Values) -> bool:
        return all(name in record_values for name in self.known)

    def columns(self, values: Values) -> tuple[str, ...]:
        return self.known

    def read(self, values: Values, where: str) -> Preference:
        given = column(values, "input", where)
        if not isinstance(given, Mapping) or "messages" not in given:
            raise FieldError(
                f"input is {kind_of(given)}", path=("input",), allowed='expected {"messages": [...]}', where=where
            )
        tools = read_tools(given.get("tools"), ("input", "tools"), where)
        turns = read_turns(given["messages"], MESSAGES, where, expected=MESSAGE_ROLES)
        asked = conversation_so_far(turns, MESSAGES, where, tools=tools)
        answers = [answer(column(values, name, where), (name,), where) for name in (BETTER, WORSE)]
        return preference(asked, answers, (WORSE,), where)
