"""Exact match: the share of answers whose final answer is the right one.

Idea: a worked solution may say anything on its way, and one line of it counts: what stands behind the last marker.
Numbers are compared as numbers, so 1,000, $1000 and 1000.00 are one. A reference without the marker is
compared as a whole. An answer that does not show the marker although its reference does has given no final answer,
and is wrong: a number that happens to stand somewhere in it is no answer.
Equation: (number of answers whose final part equals that of one of their references) / (number of answers)
Source: Cobbe et al., arXiv 2110.14168 (GSM8K), whose solutions end in a line such as #### 72.
Cost: no model; a million answers in seconds.
Use when: answers are short and there is one right one: numbers, labels, names.
Not when: a right answer can be worded in several ways (bleu, or the likelihood).
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import final

from pydantic import Field

from luthier.metrics import Metric


@final
class ExactMatch(Metric):
    """Whether final answers are equal, from 0 to 1."""

    marker: str = Field("####", min_length=1, description="what stands before the final answer")
    ignore_case: bool = Field(False, description="whether capitals count as small letters")

    def score(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        pairs = zip(answers, references, strict=True)
        return sum(any(self._equal(said, one) for one in known) for said, known in pairs) / len(answers)

    def _equal(self, answer: str, reference: str) -> bool:
        marked = self.marker in reference
        if marked and self.marker not in answer:
            return False
        said, known = (_final(text, self.marker if marked else "") for text in (answer, reference))
        if self.ignore_case:
            said, known = said.casefold(), known.casefold()
        number = _number(known)
        return said == known if number is None else _number(said) == number


def _final(text: str, marker: str) -> str:
    """The rest of the line behind the last marker, or all of the text without one; white space counts as one blank."""
    if marker:
        text = "".join(text.rpartition(marker)[2].strip().splitlines()[:1])
    return " ".join(text.split())


def _number(text: str) -> Decimal | None:
    """The number that the text is, with a sign of money or percent at most; None when it is something else."""
    try:
        found = Decimal(text.rstrip(".").removeprefix("$").removesuffix("%").replace(",", ""))
    except InvalidOperation:
        return None
    return found if found.is_finite() else None
