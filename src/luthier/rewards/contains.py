"""Contains: whether an answer says what it has to say, and nothing that it must not.

Idea: phrases are searched for in what is said. A phrase of letters is found as whole words, so that "art" is not in
"start". Since stuffing an answer with words finds them all, an answer of more than `most_words` words gets nothing.
Equation: (phrases found) / (phrases), or 1 if all (any) are found else 0; and 0 where a forbidden phrase is found
Source: Zhou et al., arXiv 2311.07911 (IFEval, keyword instructions)
Cost: no model; linear in the answer and the number of phrases.
Use when: instructions name words to use or to avoid, or a short answer may stand in a sentence.
Not when: the phrases say nothing of whether the answer is right: "not Paris" contains Paris.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal, final

from pydantic import Field, model_validator

from luthier.core.errors import DataError, RecipeError
from luthier.data.sample import Sample
from luthier.rewards import Reward, Score, Tools, Verdict


@final
class Contains(Reward):
    """Phrases that an answer has to contain or must not contain."""

    phrases: tuple[str, ...] = Field((), strict=False, description="what answers have to contain, besides the column")
    column: str = Field("", description="a column with phrases of the row: a text, or a list of texts")
    forbidden: tuple[str, ...] = Field((), strict=False, description="phrases with which an answer gets nothing")
    need: Literal["all", "any", "share"] = Field("all", description="how many have to be there")
    ignore_case: bool = Field(True, description="whether capitals count as small letters")
    most_words: int = Field(2000, ge=1, description="longer answers get nothing, in words")

    @model_validator(mode="after")
    def _something(self) -> Contains:
        if not (self.phrases or self.column or self.forbidden):
            raise RecipeError("contains is told no phrases, column or forbidden", allowed="at least one of them")
        if not all(phrase.strip() for phrase in (*self.phrases, *self.forbidden)):
            raise RecipeError(f"a phrase of {[*self.phrases, *self.forbidden]} is empty", allowed="texts")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,) if self.column else ()

    def check(self, facts: Mapping[str, Any]) -> None:
        if self.column:
            _texts(facts[self.column], self.column)

    def score(self, samples: Sequence[Sample], tools: Tools) -> list[Verdict]:
        return [self._one(sample) for sample in samples]

    def _one(self, sample: Sample) -> Score:
        wanted = [*self.phrases, *(_texts(sample.fact(self.column), self.column) if self.column else [])]
        missing = [phrase for phrase in wanted if not self._in(phrase, sample.said)]
        present = [phrase for phrase in self.forbidden if self._in(phrase, sample.said)]
        long = len(sample.said.split()) > self.most_words
        share = 1 - len(missing) / len(wanted) if wanted else 1.0
        enough = {"all": float(not missing), "any": float(len(missing) < len(wanted)), "share": share}
        told = [f"{phrase!r} is missing" for phrase in missing] + [f"{phrase!r} is forbidden" for phrase in present]
        told += [f"more than {self.most_words:,} words"] * long
        parts = {"found": share, "forbidden": float(bool(present))}
        said = bool(sample.said) and not (present or long)
        return Score(enough[self.need] if said else 0.0, parts, "; ".join(told), "; ".join(told))

    def _in(self, phrase: str, text: str) -> bool:
        return _search(phrase, self.ignore_case).search(text) is not None


@cache
def _search(phrase: str, ignore_case: bool) -> re.Pattern[str]:
    words = r"\s+".join(re.escape(word) for word in phrase.split())
    before, after = (r"\b" if letter.isalnum() else "" for letter in (phrase.strip()[0], phrase.strip()[-1]))
    return re.compile(before + words + after, re.IGNORECASE if ignore_case else 0)


def _texts(value: object, column: str) -> list[str]:
    given = value if isinstance(value, list | tuple) else [value]
    texts = [text for text in given if isinstance(text, str) and text.strip()]
    if not texts or len(texts) != len(given):
        raise DataError(f"{column} is {value!r}", allowed="a text, or a list of texts, none of them empty")
    return texts
