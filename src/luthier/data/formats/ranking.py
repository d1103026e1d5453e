"""Ranking: a prompt, and several answers to it in order, the best first, or each with a score.

Source: Ouyang et al., arXiv 2203.02155, section 3.5: people rank 4 to 9 answers, and all their pairs are learned from.
Use when: more than two answers to one prompt were compared: one row is then worth all its pairs.
"""

from __future__ import annotations

from typing import ClassVar, final

from luthier.data.conversation import Meaning, Preference
from luthier.data.formats import Format, Values
from luthier.data.formats._chat import system_message, turns_or_text
from luthier.data.formats._compared import conversation_so_far, preference, several
from luthier.data.formats._fields import FieldError, column, listed, number_at, pick

PROMPTS = ("prompt", "question", "instruction", "query", "messages")
ANSWERS = ("answers", "completions", "responses")
SCORES = ("scores", "ratings", "rewards")
RANKED = ("ranked", "ranked_answers")


@final
class Ranking(Format):
    """`{"prompt", "answers": [...], "scores": [...]}`, or `{"prompt", "ranked": [...]}` with the best first."""

    meaning: ClassVar[Meaning] = "preference"
    title: ClassVar[str] = "rankings of several answers"
    specificity: ClassVar[int] = 58
    example: ClassVar[str] = '{"prompt": "What is 2 + 2?", "answers": ["5", "4", "four"], "scores": [0, 2, 1.5]}'
    known: ClassVar[tuple[str, ...]] = ("prompt", "answers", "scores", "ranked", "system")

    def looks_like(self, record_values: Values) -> bool:
        scored = pick(record_values, ANSWERS) is not None and pick(record_values, SCORES) is not None
        return pick(record_values, PROMPTS) is not None and (scored or pick(record_values, RANKED) is not None)

    def columns(self, values: Values) -> tuple[str, ...]:
        ranked = pick(values, RANKED)
        names = (ranked,) if ranked is not None else (pick(values, ANSWERS), pick(values, SCORES))
        found = (pick(values, PROMPTS), *names, "system" if "system" in values else None)
        return tuple(name for name in found if name is not None)

    def read(self, values: Values, where: str) -> Preference:
        prompt = pick(values, PROMPTS) or PROMPTS[0]
        said = turns_or_text(column(values, prompt, where), (prompt,), where, role="user", what="the prompt")
        before = system_message(values.get("system"), ("system",), where)
        asked = conversation_so_far([*before, *said], (prompt,), where)
        ranked = pick(values, RANKED)
        if ranked is not None:
            return preference(asked, several(values[ranked], (ranked,), where), (ranked,), where)
        name, marks = pick(values, ANSWERS) or ANSWERS[0], pick(values, SCORES) or SCORES[0]
        answers = several(column(values, name, where), (name,), where)
        given = listed(column(values, marks, where), (marks,), where, of="scores")
        if len(given) != len(answers):
            raise FieldError(
                f"{name} has {len(answers)} answers, but {marks} {len(given)} scores",
                path=(marks,),
                allowed="expected a score for each answer",
                where=where,
            )
        scores = [number_at(score, (marks, index), where) for index, score in enumerate(given)]
        return preference(asked, answers, (marks,), where, scores=scores)
