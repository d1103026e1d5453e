"""Numeric: whether the final number is the right one.

Idea: the final answer is what stands behind the last ####, else in the last \\boxed{}, else the last number. It must
be one number and nothing beside a unit of money or percent: a list of numbers is no answer. Numbers are compared as
fractions, so 1,000, $1000, 1e3 and 2000/2 are one and nothing is lost to rounding. NaN and infinity are no numbers.
Equation: 1 if |said - known| <= max(absolute, relative |known|), else 0
Source: Cobbe et al., arXiv 2110.14168 (GSM8K: #### 72); Hendrycks et al., arXiv 2103.03874 (MATH: \\boxed{72})
Cost: no model; linear in the answer.
Use when: problems have a number as their result.
Not when: the result is a formula or a text (exact_match), or how it was found matters as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Final, Literal, final

from pydantic import Field

from luthier.core.errors import DataError
from luthier.data.sample import Sample
from luthier.rewards import Reward, Score, Tools, Verdict

_DIGITS: Final = r"(?:\d{1,3}(?:,\d{3}){1,60}(?![,\d])|\d{1,200})(?:\.\d{0,200})?|\.\d{1,200}"
_PLAIN: Final = rf"[-+]?\s?\$?(?:{_DIGITS})(?:[eE][-+]?\d{{1,3}})?"
_NUMBER: Final = re.compile(rf"(?P<top>{_PLAIN})(?:\s?/\s?(?P<bottom>{_PLAIN}))?\s?(?:%|\\%)?")
_LATEX: Final = re.compile(r"(-?)\\[dt]?frac\{(-?\d{1,200})\}\{(-?\d{1,200})\}")
_SEARCH: Final = re.compile(rf"(?<![\w.])-?\$?(?:{_DIGITS})(?:[eE][-+]?\d{{1,3}})?(?:/\d{{1,200}})?(?![\w])")
_MINUS: Final = str.maketrans({"\u2212": "-", "\u2013": "-"})


@final
class Numeric(Reward):
    """Whether final numbers are equal."""

    column: str = Field("answer", min_length=1, description="the column with the right number, or a worked solution")
    where: Literal["auto", "marker", "boxed", "last"] = Field(
        "auto", description="where the number stands: behind ####, in \\boxed{}, the last one, or the first of these"
    )
    absolute: float = Field(0.0, ge=0, description="how far off a right answer may be")
    relative: float = Field(0.0, ge=0, lt=1, description="how far off, as a share of the right number")

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def check(self, facts: Mapping[str, Any]) -> None:
        _known(facts[self.column], self.column)

    def score(self, samples: Sequence[Sample], tools: Tools) -> list[Verdict]:
        return [self._one(sample) for sample in samples]

    def _one(self, sample: Sample) -> Score:
        known = _known(sample.fact(self.column), self.column)
        text = _final(sample.said, self.where)
        # The last digits of an answer that was cut off may be missing.
        said = None if text is None or sample.ended == "length" else number(text)
        if said is None:
            told = "no final answer was given" if text is None else f"{text[:80]!r} is no number"
            told = "the answer was cut off" if sample.ended == "length" else told
            return Score(0.0, {"answered": 0.0}, told, told)
        room = max(Fraction(self.absolute), Fraction(self.relative) * abs(known))
        right = abs(said - known) <= room
        reason = "" if right else f"{_shown(said)} instead of {_shown(known)}"
        return Score(float(right), {"answered": 1.0}, reason, "" if right else "the final number is wrong")


def number(text: str) -> Fraction | None:
    """The number that the text is; None when it is something else."""
    text = text.translate(_MINUS).strip().strip("$").rstrip(".").strip()
    if latex := _LATEX.fullmatch(text):
        text = f"{latex[1]}{latex[2]}/{latex[3]}".replace("--", "")
    found = _NUMBER.fullmatch(text)
    if found is None:
        return None
    top, bottom = (Fraction(re.sub(r"[$,\s]", "", found[name] or "1")) for name in ("top", "bottom"))
    return top / bottom if bottom else None


def _final(text: str, where: str) -> str | None:
    """What is given as the final answer; None where nothing is."""
    if where in ("auto", "marker") and "####" in text:
        return "".join(text.rpartition("####")[2].strip().splitlines()[:1])
    if where in ("auto", "boxed") and (boxed := _boxed(text)) is not None:
        return boxed
    if where in ("auto", "last"):
        found = _SEARCH.findall(text.translate(_MINUS))
        return found[-1] if found else None
    return None


def _boxed(text: str) -> str | None:
    """What is in the last \\boxed{}, with braces inside of it."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for at in range(start + 6, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return text[start + 7 : at]
    return None


def _known(value: object, column: str) -> Fraction:
    text = str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else ""
    final = _final(text, "auto") if "####" in text or "\\boxed{" in text else text
    found = number(final or "")
    if found is None:
        raise DataError(f"{column} is {value!r}", allowed="a number, or a solution that ends in one behind ####")
    return found


def _shown(value: Fraction) -> str:
    return str(value) if value.denominator == 1 else f"{value} ({float(value):.6g})" if abs(value) < 10**300 else "?"
