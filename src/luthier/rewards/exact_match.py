"""Exact match: whether the final answer is one of those that the row knows.

Idea: what is said behind the last marker, or all that is said where there is no marker, is compared letter by letter
with the answers of the row. White space counts as one blank, and letters are brought into one Unicode form, so that two
ways to write the same letter are one. An answer that does not show the marker has given no final answer. Only its last
line counts, so listing every answer wins nothing.
Equation: 1 if final(answer) is in {final(known)}, else 0
Source: Rajpurkar et al., arXiv 1606.05250 (section 6.1, exact match)
Cost: no model; linear in the answer.
Use when: there are few right answers and each is written in one way: names, labels, choices.
Not when: the answer is a number (numeric), or may be worded in many ways (judge).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, final

from pydantic import Field

from luthier.core.errors import DataError
from luthier.data.sample import Sample
from luthier.rewards import Reward, Score, Tools, Verdict


@final
class ExactAnswer(Reward):
    """Whether answers are equal."""

    column: str = Field("answer", min_length=1, description="the column with the right answer, or a list of them")
    marker: str = Field("", description="what stands before the final answer, such as ####; empty: all of it counts")
    ignore_case: bool = Field(False, description="whether capitals count as small letters")
    ignore_marks: bool = Field(False, description="whether full stops, quotes and stars around it are passed over")

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def check(self, facts: Mapping[str, Any]) -> None:
        _texts(facts[self.column], self.column)

    def score(self, samples: Sequence[Sample], tools: Tools) -> list[Verdict]:
        return [self._one(sample) for sample in samples]

    def _one(self, sample: Sample) -> Score:
        known = [self._final(text) for text in _texts(sample.fact(self.column), self.column)]
        cut = sample.ended == "length"
        if cut or (self.marker and self.marker not in sample.said):
            told = "the answer was cut off" if cut else f"no {self.marker} before a final answer"
            return Score(0.0, reason=told, feedback=told)
        said = self._final(sample.said)
        if said and said in known:
            return Score(1.0)
        return Score(0.0, reason=f"{said!r} instead of {known[0]!r}", feedback="the final answer is wrong")

    def _final(self, text: str) -> str:
        if self.marker and self.marker in text:
            text = "".join(text.rpartition(self.marker)[2].strip().splitlines()[:1])
        text = " ".join(unicodedata.normalize("NFC", text).split())
        if self.ignore_marks:
            text = text.strip(" .\"'`*")
        return text.casefold() if self.ignore_case else text


def _texts(known: object, column: str) -> list[str]:
    texts = list(known) if isinstance(known, list | tuple) else [known]
    if not texts or not all(isinstance(text, str | int) and str(text).strip() for text in texts):
        raise DataError(f"{column} is {known!r}", allowed="a text, or a list of texts, none of them empty")
    return [str(text) for text in texts]
