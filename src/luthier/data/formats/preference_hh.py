r"""Preference in the notation of Anthropic's HH: two dialogues as text, "\n\nHuman: ...\n\nAssistant: ...".

What the dialogues share is the prompt; with a column `prompt` that ends in "Assistant:" the two are answers to it.
Source: Bai et al., arXiv 2204.05862; the data set Anthropic/hh-rlhf.
Use when: data comes from there, or from the many that copied its notation.
"""

from __future__ import annotations

import re
from typing import ClassVar, final

from luthier.data.conversation import Meaning, Message, Preference
from luthier.data.formats import Format, Values
from luthier.data.formats._compared import parted, preference, score_columns, scores_of_pair
from luthier.data.formats._fields import FieldError, column, dotted, is_preference, text_at

TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


@final
class HumanAssistant(Format):
    r"""`{"chosen": "\n\nHuman: ...\n\nAssistant: ...", "rejected": ...}`, with `prompt`."""

    meaning: ClassVar[Meaning] = "preference"
    title: ClassVar[str] = "preference pairs as dialogues of Human and Assistant"
    specificity: ClassVar[int] = 62
    example: ClassVar[str] = (
        r'{"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!", "rejected": "\n\nHuman: Hi\n\nAssistant: What?"}'
    )
    known: ClassVar[tuple[str, ...]] = ("chosen", "rejected", "prompt")

    def looks_like(self, record_values: Values) -> bool:
        first = record_values.get("prompt") or record_values.get("chosen")
        return is_preference(record_values) and isinstance(first, str) and TURN.match(first) is not None

    def columns(self, values: Values) -> tuple[str, ...]:
        return (*(name for name in self.known if name in values), *score_columns(values))

    def read(self, values: Values, where: str) -> Preference:
        before = text_at(values["prompt"], ("prompt",), where) if values.get("prompt") is not None else ""
        one, two = (_turns(values, name, before, where) for name in ("chosen", "rejected"))
        asked, chosen, rejected = parted(one, two, where)
        return preference(asked, (chosen, rejected), ("rejected",), where, scores=scores_of_pair(values, where))


def _turns(values: Values, name: str, before: str, where: str) -> list[Message]:
    text = text_at(column(values, name, where), (name,), where)
    text = text if text.startswith(before) else before + text
    pieces = TURN.split(text)
    if pieces[0].strip():
        raise FieldError(
            f"{dotted((name,))} begins with neither Human: nor Assistant:",
            path=(name,),
            allowed='expected "\\n\\nHuman: ...\\n\\nAssistant: ..."',
            where=where,
        )
    turns = []
    for who, words in zip(pieces[1::2], pieces[2::2], strict=True):
        if not words.strip():
            raise FieldError(
                f"a turn of {who} is empty ({dotted((name,))})", path=(name,), allowed="expected some text", where=where
            )
        turns.append(Message("user" if who == "Human" else "assistant", words.strip()))
    return turns
