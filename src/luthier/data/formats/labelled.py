"""Labelled: a text, or a pair of texts, and the class it belongs to.

A class is a name, a whole number, or true or false; it is known by its name from then on. Fractions are refused: they
are scores, not classes.
Source: the columns of GLUE (sentence; sentence1, sentence2; premise, hypothesis; question, sentence) and of SetFit.
Use when: a model shall sort texts. To learn the words of such texts, objectives of language modelling read the text
alone.
"""

from __future__ import annotations

from typing import ClassVar, final

from luthier.data.conversation import Labelled, Meaning
from luthier.data.formats import Format, Values
from luthier.data.formats._fields import class_name, column, filled, is_preference, pick

PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
    ("text", "text_pair"),
    ("text", "pair"),
)
TEXTS = ("text", "sentence", "content")
LABELS = ("label", "class", "category")


@final
class LabelledText(Format):
    """`{"text", "label"}` and its synonyms, or a pair of texts with a label."""

    meaning: ClassVar[Meaning] = "labelled"
    title: ClassVar[str] = "texts with a class"
    specificity: ClassVar[int] = 14
    example: ClassVar[str] = '{"text": "What a film!", "label": "good"}'
    known: ClassVar[tuple[str, ...]] = tuple(
        dict.fromkeys([*TEXTS, *(name for pair in PAIRS for name in pair), *LABELS])
    )

    def looks_like(self, record_values: Values) -> bool:
        labelled = pick(record_values, LABELS) is not None
        return labelled and bool(_texts(record_values)) and not is_preference(record_values)

    def columns(self, values: Values) -> tuple[str, ...]:
        label = pick(values, LABELS)
        return (*_texts(values), *(() if label is None else (label,)))

    def read(self, values: Values, where: str) -> Labelled:
        return labelled(values, _texts(values) or TEXTS[:1], pick(values, LABELS) or LABELS[0], where)


def labelled(values: Values, texts: tuple[str, ...], label: str, where: str) -> Labelled:
    """The text, or the pair of texts, in the columns `texts`, with the class in the column `label`."""
    words = [filled(column(values, name, where), (name,), where, what="the text") for name in texts]
    return Labelled(words[0], class_name(column(values, label, where), (label,), where), *words[1:])


def _texts(values: Values) -> tuple[str, ...]:
    """The columns of the first pair of names that the row has, or else of the first text."""
    for names in PAIRS:
        first, second = (pick(values, [name]) for name in names)
        if first is not None and second is not None:
            return first, second
    name = pick(values, TEXTS)
    return () if name is None else (name,)
