"""Alpaca: an instruction, perhaps an input it is about, and the output.

The user says the instruction and, when there is an input, an empty line and the input; no other words are added.
`history` holds earlier turns as pairs, `system` a system message.
Source: Stanford Alpaca; `history` and `system` as LLaMA-Factory reads them; Dolly says context and response.
Use when: data comes from there.
"""

from __future__ import annotations

from typing import ClassVar, final

from luthier.data.conversation import Conversation, Meaning, Message
from luthier.data.formats import Format, Values
from luthier.data.formats._chat import conversation, system_message
from luthier.data.formats._fields import (
    FieldError,
    column,
    dotted,
    filled,
    is_list,
    is_preference,
    kind_of,
    pick,
    text_at,
)

INPUTS = ("input", "context")
OUTPUTS = ("output", "response")


@final
class Alpaca(Format):
    """`{"instruction", "input", "output", "history", "system"}`."""

    meaning: ClassVar[Meaning] = "conversation"
    title: ClassVar[str] = "Alpaca instructions"
    specificity: ClassVar[int] = 40
    example: ClassVar[str] = '{"instruction": "Translate to French.", "input": "Hello", "output": "Bonjour"}'
    known: ClassVar[tuple[str, ...]] = ("instruction", "input", "output", "history", "system")

    def looks_like(self, record_values: Values) -> bool:
        has_output = any(name in record_values for name in OUTPUTS)
        return "instruction" in record_values and has_output and not is_preference(record_values)

    def columns(self, values: Values) -> tuple[str, ...]:
        names = ("instruction", pick(values, INPUTS), pick(values, OUTPUTS), "history", "system")
        return tuple(name for name in names if name in values and name is not None)

    def read(self, values: Values, where: str) -> Conversation:
        asked = [text_at(column(values, "instruction", where), ("instruction",), where)]
        input_name = pick(values, INPUTS)
        if input_name is not None and values[input_name] is not None:
            asked.append(text_at(values[input_name], (input_name,), where))
        question = "\n\n".join(part for part in asked if part.strip())
        output = pick(values, OUTPUTS) or OUTPUTS[0]
        messages = [
            *system_message(values.get("system"), ("system",), where),
            *_history(values.get("history"), where),
            Message("user", filled(question, ("instruction",), where, what="the prompt")),
            Message("assistant", filled(column(values, output, where), (output,), where, what="the answer")),
        ]
        return conversation(messages, (output,), where)


def _history(value: object, where: str) -> list[Message]:
    """Earlier turns, as pairs of what the user and the assistant said."""
    if value is None or value == "":
        return []
    if not is_list(value):
        raise FieldError(
            f"history is {kind_of(value)}", path=("history",), allowed="expected a list of pairs", where=where
        )
    messages: list[Message] = []
    for index, pair in enumerate(value):
        path = ("history", index)
        if not is_list(pair) or len(pair) != 2:
            came = f"{len(pair)} values" if is_list(pair) else kind_of(pair)
            raise FieldError(
                f"{dotted(path)} is {came}", path=path, allowed='expected ["what was asked", "the answer"]', where=where
            )
        messages.append(Message("user", filled(pair[0], (*path, 0), where, what="the prompt")))
        messages.append(Message("assistant", filled(pair[1], (*path, 1), where, what="the answer")))
    return messages
