"""Choices: a question with several answers, one of which is right.

Which one is said by the answer itself, by its letter, or by its place, counted from 0; they are tried in this order.
Choices may also be an object with the lists `text` and `label`; the right answer is then named by its label.
Source: the columns of MMLU, ARC, CommonsenseQA, HellaSwag and of the benchmarks like them.
Use when: a model shall tell the right answer from wrong ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, final

from luthier.data.conversation import Choices, Meaning
from luthier.data.formats import Format, Values
from luthier.data.formats._fields import FieldError, column, dotted, filled, kind_of, listed, pick, shown

PROMPTS = ("question", "prompt", "query", "ctx")
CHOICES = ("choices", "options", "endings")
RIGHT = ("answer", "label", "answerkey", "answer_index", "right")


@final
class ChoiceOfAnswers(Format):
    """`{"question", "choices": [...], "answer"}` and its synonyms."""

    meaning: ClassVar[Meaning] = "choices"
    title: ClassVar[str] = "questions with a choice of answers"
    specificity: ClassVar[int] = 35
    example: ClassVar[str] = '{"question": "What is 2 + 2?", "choices": ["3", "4", "5"], "answer": "B"}'
    known: ClassVar[tuple[str, ...]] = (*PROMPTS, *CHOICES, *RIGHT)

    def looks_like(self, record_values: Values) -> bool:
        return all(pick(record_values, names) is not None for names in (PROMPTS, CHOICES, RIGHT))

    def columns(self, values: Values) -> tuple[str, ...]:
        return tuple(name for names in (PROMPTS, CHOICES, RIGHT) if (name := pick(values, names)) is not None)

    def read(self, values: Values, where: str) -> Choices:
        names = (pick(values, known) or known[0] for known in (PROMPTS, CHOICES, RIGHT))
        prompt, answers, right = names
        return choices(values, (prompt, answers, right), where)


def choices(values: Values, names: tuple[str, str, str], where: str) -> Choices:
    """The choice in the columns of the question, of the answers, and of what says which is right."""
    prompt, several, right = names
    asked = filled(column(values, prompt, where), (prompt,), where, what="the prompt")
    answers, marks = _answers(column(values, several, where), several, where)
    if len(answers) < 2:
        raise FieldError(
            f"{several} holds {len(answers)} answers", path=(several,), allowed="expected two or more", where=where
        )
    place = _place(column(values, right, where), answers, marks, right, where)
    if answers.count(answers[place]) > 1:
        raise FieldError(
            f"the right answer stands in {several} more than once",
            path=(several,),
            allowed="expected answers that differ",
            where=where,
        )
    return Choices(asked, answers, place)


def _answers(value: object, name: str, where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The answers, and the marks by which the row calls them, which may be none."""
    marks: Sequence[object] = ()
    path: tuple[str | int, ...] = (name,)
    if isinstance(value, Mapping) and "text" in value:
        marks = listed(value.get("label", ()), (name, "label"), where, of="marks")
        path = (name, "text")
        value = value["text"]
    said = listed(value, path, where, of="answers")
    answers = tuple(filled(one, (*path, index), where, what="an answer") for index, one in enumerate(said))
    if marks and len(marks) != len(answers):
        raise FieldError(
            f"{name} has {len(answers)} texts, but {len(marks)} labels",
            path=(name,),
            allowed="expected a label for each text",
            where=where,
        )
    return answers, tuple(str(mark) for mark in marks)


def _place(value: object, answers: Sequence[str], marks: Sequence[str], name: str, where: str) -> int:
    """Which answer is right."""
    count = len(answers)
    if isinstance(value, int) and not isinstance(value, bool):
        if str(value) in marks:
            return marks.index(str(value))
        if 0 <= value < count:
            return value
        allowed = f"expected a place from 0 to {count - 1}"
        raise FieldError(f"{dotted((name,))} is {value}", path=(name,), allowed=allowed, where=where)
    if isinstance(value, str):
        text = value.strip()
        for known in (marks, answers, [answer.strip() for answer in answers]):
            if text in known:
                return list(known).index(text)
        letters = [chr(ord("A") + index) for index in range(min(count, 26))]
        if text.upper() in letters:
            return letters.index(text.upper())
        if text.isascii() and text.isdecimal() and int(text[:9]) < count:
            return int(text)
    raise FieldError(
        f"{dotted((name,))} is {shown(value) if isinstance(value, str) else kind_of(value)}",
        path=(name,),
        allowed=f"expected one of the {count} answers: its place from 0, its letter from A, or its text",
        where=where,
    )
