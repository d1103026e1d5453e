"""Asked: a prompt without an answer, and the facts by which answers to it are checked: all other columns.

The prompt is a string, a message or a list of messages; when a conversation ends with an answer, that becomes the fact
`answer`. Facts keep their names: `answer`, `tests`, a schema, whatever a reward reads.
Source: the prompt-only shape of TRL; its reward functions are given the other columns by name.
Use when: a model shall answer by itself and be rewarded for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar, final

from luthier.data.conversation import Asked, Meaning, Message
from luthier.data.formats import Format, Values
from luthier.data.formats._chat import read_tools, system_message, turns_or_text
from luthier.data.formats._compared import conversation_so_far
from luthier.data.formats._fields import FieldError, column, kind_of, pick

PROMPTS = ("prompt", "messages", "conversations", "question", "instruction", "problem", "query")
BESIDE = ("system", "tools")


@final
class Question(Format):
    """`{"prompt", ...}` or one of its synonyms, with `system`, `tools` and facts."""

    meaning: ClassVar[Meaning] = "asked"
    title: ClassVar[str] = "prompts with facts to check answers by"
    # Almost every row has a prompt: this fits where nothing else is wanted.
    specificity: ClassVar[int] = 0
    example: ClassVar[str] = '{"prompt": "What is 2 + 2?", "answer": "4"}'
    known: ClassVar[tuple[str, ...]] = (*PROMPTS, *BESIDE)

    def looks_like(self, record_values: Values) -> bool:
        return pick(record_values, PROMPTS) is not None

    def columns(self, values: Values) -> tuple[str, ...]:
        return tuple(values)

    def read(self, values: Values, where: str) -> Asked:
        return asked(values, pick(values, PROMPTS) or PROMPTS[0], where)


def asked(values: Values, prompt: str, where: str, *, system: str | None = "system") -> Asked:
    """What the column `prompt` asks; the columns that say nothing of the conversation are facts."""
    written = column(values, prompt, where)
    turns = turns_or_text(written, (prompt,), where, role="user", what="the prompt")
    tools = read_tools(values.get("tools"), ("tools",), where)
    facts = {name: _fact(value, name, where) for name, value in values.items() if name not in (prompt, *BESIDE, system)}
    if turns[-1].role == "assistant" and len(turns) > 1:
        answer = turns.pop()
        facts.setdefault("answer", answer.content)
    before: list[Message] = []
    if system is not None:
        before = system_message(values.get(system), (system,), where)
    text = written if isinstance(written, str) else None
    return Asked(conversation_so_far([*before, *turns], (prompt,), where, tools=tools), facts, text)


def _fact(value: object, name: str, where: str) -> Any:
    """A value that JSON can hold."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        came = kind_of(value) if not isinstance(value, Mapping) else "an object with values of other types"
        raise FieldError(
            f"{name} is {came}", path=(name,), allowed="expected what JSON can hold: it is kept as a fact", where=where
        ) from None
    return value
