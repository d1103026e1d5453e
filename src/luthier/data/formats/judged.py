"""Judged: a prompt, an answer to it, and whether the answer is good.

Source: the unpaired preference shape of TRL (`prompt`, `completion`, `label`), made for KTO (arXiv 2402.01306).
Use when: answers were judged one by one, a thumb up or down, and nobody compared two of them.
"""

from __future__ import annotations

from typing import ClassVar, final

from luthier.data.conversation import Judged, Meaning
from luthier.data.formats import Format, Values
from luthier.data.formats._chat import system_message
from luthier.data.formats._compared import judged
from luthier.data.formats._fields import is_preference, pick

PROMPTS = ("prompt", "question", "instruction", "query")
ANSWERS = ("completion", "response", "output", "answer")
LABELS = ("label", "good", "desirable", "kto_tag")


@final
class JudgedAnswer(Format):
    """`{"prompt", "completion", "label": true or false}`, with `system`."""

    meaning: ClassVar[Meaning] = "judged"
    title: ClassVar[str] = "answers judged good or bad"
    specificity: ClassVar[int] = 55
    example: ClassVar[str] = '{"prompt": "What is 2 + 2?", "completion": "4", "label": true}'
    known: ClassVar[tuple[str, ...]] = (*PROMPTS, *ANSWERS, *LABELS)

    def looks_like(self, record_values: Values) -> bool:
        parts = (PROMPTS, ANSWERS, LABELS)
        return all(pick(record_values, names) is not None for names in parts) and not is_preference(record_values)

    def columns(self, values: Values) -> tuple[str, ...]:
        names = [pick(values, known) for known in (PROMPTS, ANSWERS, LABELS)]
        return (*(name for name in names if name is not None), *(("system",) if "system" in values else ()))

    def read(self, values: Values, where: str) -> Judged:
        prompt, reply, label = (pick(values, known) or known[0] for known in (PROMPTS, ANSWERS, LABELS))
        before = system_message(values.get("system"), ("system",), where)
        return judged(values, (prompt, reply, label), where, before=before)
