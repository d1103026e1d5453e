"""Prompt and completion: each a string, or a list of messages.

Strings become one question of the user and one answer; messages stay what they are.
Source: the prompt-completion shape of TRL, and the `response` column that other tools write.
Use when: rows are single exchanges, or a conversation cut into what is given and what is to be said.
"""

from __future__ import annotations

from typing import ClassVar, final

from luthier.data.conversation import Conversation, Meaning
from luthier.data.formats import Format, Values
from luthier.data.formats._chat import exchange
from luthier.data.formats._fields import column, pick_pair

PAIRS = (("prompt", "completion"), ("prompt", "response"))


@final
class PromptCompletion(Format):
    """`{"prompt", "completion"}` or `{"prompt", "response"}`, with `system`."""

    meaning: ClassVar[Meaning] = "conversation"
    title: ClassVar[str] = "prompt and completion"
    specificity: ClassVar[int] = 30
    example: ClassVar[str] = '{"prompt": "The capital of France is", "completion": " Paris."}'
    known: ClassVar[tuple[str, ...]] = ("prompt", "completion", "response", "system")

    def looks_like(self, record_values: Values) -> bool:
        return pick_pair(record_values, PAIRS) is not None

    def columns(self, values: Values) -> tuple[str, ...]:
        return (*(pick_pair(values, PAIRS) or ()), *(("system",) if "system" in values else ()))

    def read(self, values: Values, where: str) -> Conversation:
        prompt, answer = pick_pair(values, PAIRS) or PAIRS[0]
        paths = ((prompt,), (answer,))
        asked, answered = column(values, prompt, where), column(values, answer, where)
        return exchange(asked, answered, paths, where, system=values.get("system"))
