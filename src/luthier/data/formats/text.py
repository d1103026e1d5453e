"""Text: a document without roles, in the column `text` or `content`, or a whole text file.

Source: the corpora of pre-training (C4, Dolma, FineWeb).
Use when: the model should go on learning the language of documents, not answers.
"""

from __future__ import annotations

from typing import ClassVar, final

from luthier.data.conversation import Meaning, Text
from luthier.data.formats import Format, Values
from luthier.data.formats._fields import column, filled, is_preference, pick

NAMES = ("text", "content")


@final
class PlainText(Format):
    """`{"text"}` or `{"content"}`."""

    meaning: ClassVar[Meaning] = "text"
    title: ClassVar[str] = "plain text"
    specificity: ClassVar[int] = 10
    example: ClassVar[str] = '{"text": "Once upon a time, ..."}'
    known: ClassVar[tuple[str, ...]] = NAMES

    def looks_like(self, record_values: Values) -> bool:
        return pick(record_values, NAMES) is not None and not is_preference(record_values)

    def columns(self, values: Values) -> tuple[str, ...]:
        name = pick(values, NAMES)
        return () if name is None else (name,)

    def read(self, values: Values, where: str) -> Text:
        name = pick(values, NAMES) or NAMES[0]
        return Text(filled(column(values, name, where), (name,), where, what="the text"))
