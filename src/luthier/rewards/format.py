"""Format: whether an answer has the form that was asked for.

Idea: a form is one of three things: tags that follow each other, each opened and closed exactly once with something
between; a JSON object; or a regular expression that the whole answer matches. Tags are searched for as they are
written, so invisible letters inside a tag make it another text, and a second pair or one inside another is refused.
Equation: 1 if the answer has the form, else 0; with `partial`, tags give (tags that are right) / (tags).
Source: Guo et al., arXiv 2501.12948 (section 2.2.2, format rewards).
Cost: no model; tags and JSON take linear time. A regular expression may take exponential time on an answer that was
made for it, so each match has `seconds`; what takes longer is left out and told, not scored.
Use when: something later reads the answer by its form; as the lowest rung of a ladder, with a small weight.
Not when: it is the only reward: models fill any form with nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Final, final

import regex
from pydantic import Field, model_validator

from luthier.core.errors import DataError, RecipeError
from luthier.data.sample import Sample
from luthier.data.strict_json import Place, parse
from luthier.rewards import Reward, RewardError, Score, Tools, Verdict

DEFAULT: Final = ("think", "answer")
"""The tags where nothing else is asked for."""


@final
class AnswerFormat(Reward):
    """Tags in order, a JSON object, or a regular expression."""

    tags: tuple[str, ...] | None = Field(
        None, strict=False, description="names of tags, each once and in this order; empty: think and answer, where no "
        "other form is given"
    )  # fmt: skip
    opened: bool = Field(False, description="whether the prompt opens the first tag already")
    outside: bool = Field(False, description="whether other text may stand before, between and after the tags")
    json_object: bool = Field(False, description="whether the answer, apart from what was thought, is a JSON object")
    pattern: str = Field("", description="regular expression for the whole answer; a dot matches line breaks too")
    seconds: float = Field(0.5, gt=0, le=10, description="the longest a match of the pattern may take")
    partial: bool = Field(False, description="whether each right tag gives its share")

    @model_validator(mode="after")
    def _one_form(self) -> AnswerFormat:
        given = [name for name in ("tags", "json_object", "pattern") if getattr(self, name)]
        if len(given) > 1 or (not given and self.tags is not None):
            raise RecipeError(f"format is told {given}", allowed="one of tags, json_object and pattern")
        if wrong := [tag for tag in self.tags or () if not tag.strip() or set(tag) & set("<>/ ")]:
            raise RecipeError(f"{wrong[0]!r} is no name of a tag", allowed="a word, as in think")
        if self.pattern:
            _compiled(self.pattern)
        return self

    def score(self, samples: Sequence[Sample], tools: Tools) -> list[Verdict]:
        return [self._one(sample) for sample in samples]

    def _one(self, sample: Sample) -> Verdict:
        if self.json_object:
            return _verdict(_json_trouble(sample.said))
        if not self.pattern:
            tags = self.tags or DEFAULT
            return self._tagged(tags, f"<{tags[0]}>" * self.opened + sample.answer)
        try:
            found = _compiled(self.pattern).fullmatch(sample.answer.strip(), timeout=self.seconds)
        except TimeoutError:
            told = f"the pattern was not done with an answer of {len(sample.answer):,} characters in {self.seconds} s"
            # It would take as long again.
            return RewardError(told, do="write the pattern without nested repetition").of(sample, again=False)
        return _verdict("" if found else "the answer does not match the pattern")

    def _tagged(self, tags: tuple[str, ...], answer: str) -> Score:
        troubles = {tag: _tag_trouble(answer, tag) for tag in tags}
        places = [(answer.find(f"<{tag}>"), answer.find(f"</{tag}>") + len(tag) + 3) for tag in tags]
        order = "" if any(troubles.values()) else _order_trouble(answer, places, outside=self.outside)
        right = 0.0 if order else sum(not trouble for trouble in troubles.values()) / len(tags)
        reason = "; ".join(filter(None, [*troubles.values(), order]))
        parts = {f"<{tag}>": float(not trouble) for tag, trouble in troubles.items()}
        return Score(right if self.partial else float(right == 1), parts, reason, reason)


def _tag_trouble(answer: str, tag: str) -> str:
    opened, closed = f"<{tag}>", f"</{tag}>"
    counts = answer.count(opened), answer.count(closed)
    if counts != (1, 1):
        return f"{opened} is opened {counts[0]} times and closed {counts[1]} times"
    inside = answer.partition(opened)[2].partition(closed)
    if not inside[1]:
        return f"{opened} is closed before it is opened"
    return "" if inside[0].strip() else f"{opened} is empty"


def _order_trouble(answer: str, places: list[tuple[int, int]], *, outside: bool) -> str:
    starts, ends = [len(answer), *(end for _, end in places)], [*(start for start, _ in places), len(answer)]
    gaps = list(zip([0, *starts[1:]], ends, strict=True))
    if any(end < start for start, end in gaps):
        return "the tags are not in the order that was asked for"
    return "" if outside or not any(answer[start:end].strip() for start, end in gaps) else "text outside of the tags"


def _json_trouble(text: str) -> str:
    try:
        value = parse(text, Place("answer"))
    except DataError as failure:
        return f"no JSON: {failure}"
    return "" if isinstance(value, dict) else f"JSON, but a {type(value).__name__} and no object"


def _verdict(trouble: str) -> Score:
    return Score(0.0 if trouble else 1.0, reason=trouble, feedback=trouble)


@cache
def _compiled(pattern: str) -> Any:
    try:
        return regex.compile(pattern, regex.DOTALL)
    except regex.error as failure:
        raise RecipeError(f"{pattern!r} is no regular expression: {failure}", allowed="one of Python's") from failure
