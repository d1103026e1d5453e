"""Question and answer: two columns of text under one of the pairs of names that data sets use.

Source: gsm8k (question, answer), seq2seq corpora (source, target; input, output), the E2E challenge (mr, ref).
Use when: rows are one question and one answer. A pair of names that is not here: `data.columns`.
"""

from __future__ import annotations

from typing import ClassVar, final

from luthier.data.conversation import Conversation, Meaning
from luthier.data.formats import Format, Values
from luthier.data.formats._chat import exchange
from luthier.data.formats._fields import column, filled, pick_pair

PAIRS = (
    ("question", "answer"),
    ("question", "response"),
    ("input", "output"),
    ("query", "response"),
    ("source", "target"),
    ("mr", "ref"),
)


@final
class QuestionAnswer(Format):
    """`{"question", "answer"}` and its synonyms, with `system`."""

    meaning: ClassVar[Meaning] = "conversation"
    title: ClassVar[str] = "question and answer"
    specificity: ClassVar[int] = 20
    example: ClassVar[str] = '{"question": "What is 2 + 2?", "answer": "4"}'
    known: ClassVar[tuple[str, ...]] = tuple(dict.fromkeys(name for pair in PAIRS for name in pair))

    def looks_like(self, record_values: Values) -> bool:
        return pick_pair(record_values, PAIRS) is not None

    def columns(self, values: Values) -> tuple[str, ...]:
        return (*(pick_pair(values, PAIRS) or ()), *(("system",) if "system" in values else ()))

    def read(self, values: Values, where: str) -> Conversation:
        question, answer = pick_pair(values, PAIRS) or PAIRS[0]
        asked = filled(column(values, question, where), (question,), where, what="the prompt")
        answered = filled(column(values, answer, where), (answer,), where, what="the answer")
        return exchange(asked, answered, ((question,), (answer,)), where, system=values.get("system"))
