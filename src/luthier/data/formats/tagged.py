"""Tagged: the words of a text, and a class for each of them.

Both are lists of the same length, or strings that hold one as JSON.
Source: the columns of CoNLL-2003 and of the data sets for named entities and parts of speech that followed it.
Use when: a model shall mark words in a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, final

from luthier.data.conversation import Meaning, Tagged
from luthier.data.formats import Format, Values
from luthier.data.formats._fields import FieldError, class_name, column, filled, listed, pick

WORDS = ("tokens", "words")
TAGS = ("tags", "ner_tags", "labels", "pos_tags")


@final
class TaggedWords(Format):
    """`{"tokens": [...], "ner_tags": [...]}` and its synonyms."""

    meaning: ClassVar[Meaning] = "tagged"
    title: ClassVar[str] = "words with a class each"
    specificity: ClassVar[int] = 16
    example: ClassVar[str] = '{"tokens": ["Ada", "lives", "in", "Oslo"], "tags": ["PERSON", "O", "O", "PLACE"]}'
    known: ClassVar[tuple[str, ...]] = (*WORDS, *TAGS)

    def looks_like(self, record_values: Values) -> bool:
        return all(pick(record_values, names) is not None for names in (WORDS, TAGS))

    def columns(self, values: Values) -> tuple[str, ...]:
        return tuple(name for names in (WORDS, TAGS) if (name := pick(values, names)) is not None)

    def read(self, values: Values, where: str) -> Tagged:
        return tagged(values, pick(values, WORDS) or WORDS[0], pick(values, TAGS) or TAGS[0], where)


def tagged(values: Values, words: str, tags: str, where: str) -> Tagged:
    """The words in the column `words`, each with the class at its place in the column `tags`."""
    said = listed(column(values, words, where), (words,), where, of="words")
    marks = listed(column(values, tags, where), (tags,), where, of="tags")
    if len(said) != len(marks):
        raise FieldError(
            f"{words} holds {len(said)} words, but {tags} {len(marks)}",
            path=(tags,),
            allowed="expected a tag for each word",
            where=where,
        )
    return Tagged(
        tuple(filled(word, (words, index), where, what="a word") for index, word in enumerate(said)),
        _names(marks, tags, where),
    )


def _names(marks: Sequence[object], column: str, where: str) -> tuple[str, ...]:
    return tuple(class_name(mark, (column, index), where) for index, mark in enumerate(marks))
