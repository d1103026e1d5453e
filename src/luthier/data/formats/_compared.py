"""What formats of answers share: a conversation so far, answers to it, and where two conversations part."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from luthier.data.conversation import Conversation, Judged, Message, Preference
from luthier.data.formats._chat import turns_or_text
from luthier.data.formats._fields import FieldError, Path, column, dotted, kind_of, listed, number_at

Answer = tuple[Message, ...]
Tools = tuple[Mapping[str, Any], ...]
SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating"))
MARGIN = "margin"
PROBABILITY = "probability"
_SURE: Final = 1e-6
"""What is left to doubt where a probability says 1: certainty has infinite log odds."""


def conversation_so_far(messages: Sequence[Message], path: Path, where: str, *, tools: Tools = ()) -> Conversation:
    """Messages that an answer can follow."""
    if not messages:
        raise FieldError(
            f"nothing is said before the answer ({dotted(path)})",
            path=path,
            allowed="expected a message that the answer is to",
            where=where,
        )
    if messages[-1].role == "assistant":
        raise FieldError(
            f"{dotted(path)} ends with an assistant message, where an answer shall begin",
            path=path,
            allowed="expected a message of the user, or a tool's result",
            where=where,
        )
    if all(message.role == "system" for message in messages):
        raise FieldError(
            f"{dotted(path)} has a system message only", path=path, allowed="expected a user message", where=where
        )
    return Conversation(tuple(messages), tools)


def answer(value: object, path: Path, where: str) -> Answer:
    """An answer: a string, a message, or messages of which the first and the last are the assistant's."""
    turns = turns_or_text(value, path, where, role="assistant", what="the answer")
    return said(turns, path, where)


def said(turns: Sequence[Message], path: Path, where: str) -> Answer:
    """Messages as an answer."""
    for turn, place in ((turns[0], "begins"), (turns[-1], "ends")) if turns else ():
        if turn.role != "assistant":
            raise FieldError(
                f"{dotted(path)} {place} with a {turn.role} message",
                path=path,
                allowed="expected an assistant message",
                where=where,
            )
    if not turns:
        raise FieldError(f"{dotted(path)} is empty", path=path, allowed="expected an answer", where=where)
    return tuple(turns)


def preference(
    asked: Conversation,
    answers: Sequence[Answer],
    path: Path,
    where: str,
    *,
    scores: Sequence[float] | None = None,
) -> Preference:
    """Answers of which the first is the best; with scores, in the order of these."""
    order = list(range(len(answers)))
    if scores is not None:
        order.sort(key=lambda index: -scores[index])
        if len(set(scores)) == 1:
            raise FieldError(
                f"all answers have the score {scores[0]:g}, so that none is better",
                path=path,
                allowed="expected scores that differ",
                where=where,
            )
    ranked = [answers[index] for index in order]
    for place, one in enumerate(ranked):
        if one in ranked[:place]:
            raise FieldError(
                "two of the answers are the same, so that neither is better",
                path=path,
                allowed="expected answers that differ",
                do="take the row out, or set data.on_bad_row to skip",
                where=where,
            )
    kept = None if scores is None else tuple(float(scores[index]) for index in order)
    return Preference(asked, tuple(ranked), kept)


def parted(
    chosen: Sequence[Message], rejected: Sequence[Message], where: str, *, tools: Tools = ()
) -> tuple[Conversation, Answer, Answer]:
    """What two conversations share, and the answers in which they part."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == len(chosen) == len(rejected):
        raise FieldError(
            "chosen and rejected are the same, so that neither is better",
            path=("rejected",),
            allowed="expected answers that differ",
            do="take the row out, or set data.on_bad_row to skip",
            where=where,
        )
    # One that goes on where the other ends parts from it at the last answer that both have.
    while shared and min(len(chosen), len(rejected)) <= shared:
        shared -= 1
    answers = said(chosen[shared:], ("chosen",), where), said(rejected[shared:], ("rejected",), where)
    return conversation_so_far(chosen[:shared], ("chosen",), where, tools=tools), *answers


def scores_of_pair(values: Mapping[str, object], where: str) -> tuple[float, float] | None:
    """How good the chosen and the rejected answer are, as a pair of columns or a margin says, or the log odds of the
    probability that the chosen one is better; None where nothing does."""
    for one, two in SCORES:
        if values.get(one) is not None and values.get(two) is not None:
            found = number_at(values[one], (one,), where), number_at(values[two], (two,), where)
            return _ordered(*found, (one,), where, f"{one} is {found[0]:g} and {two} {found[1]:g}")
    if values.get(MARGIN) is not None:
        margin = number_at(values[MARGIN], (MARGIN,), where)
        return _ordered(margin, 0.0, (MARGIN,), where, f"{MARGIN} is {margin:g}")
    if values.get(PROBABILITY) is not None:
        likely = number_at(values[PROBABILITY], (PROBABILITY,), where)
        if not 0 <= likely <= 1:
            raise FieldError(
                f"{PROBABILITY} is {likely:g}", path=(PROBABILITY,), allowed="expected 0.5 to 1", where=where
            )
        odds = math.log(max(likely, _SURE) / max(1 - likely, _SURE))
        return _ordered(odds, 0.0, (PROBABILITY,), where, f"{PROBABILITY} is {likely:g}")
    return None


def score_columns(values: Mapping[str, object]) -> tuple[str, ...]:
    """The columns that `scores_of_pair` reads."""
    for pair in SCORES:
        if all(values.get(name) is not None for name in pair):
            return pair
    return next(((name,) for name in (MARGIN, PROBABILITY) if values.get(name) is not None), ())


def _ordered(chosen: float, rejected: float, path: Path, where: str, found: str) -> tuple[float, float]:
    if chosen <= rejected:
        raise FieldError(
            f"{found}, so the chosen answer is not better than the rejected one",
            path=path,
            allowed="expected a higher score for the chosen answer",
            do="take the row out, or read it without scores: data.columns {prompt: ..., chosen: ..., rejected: ...}",
            where=where,
        )
    return chosen, rejected


def good_or_bad(value: object, path: Path, where: str) -> bool:
    """Whether an answer is good: true or false, 1 or 0, or these as text."""
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    if isinstance(value, bool | int | float | str) and (found := known.get(str(value).strip().lower())) is not None:
        return found
    raise FieldError(
        f"{dotted(path)} is {value if isinstance(value, int | float) else kind_of(value)}",
        path=path,
        allowed="expected true for a good answer, false for a bad one",
        where=where,
    )


def judged(
    values: Mapping[str, object], names: tuple[str, str, str], where: str, *, before: Sequence[Message] = ()
) -> Judged:
    """What the columns of the prompt, of an answer to it and of the judgement say, after the messages `before`."""
    prompt, reply, good = ((column(values, name, where), (name,)) for name in names)
    turns = [*before, *turns_or_text(*prompt, where, role="user", what="the prompt")]
    asked = conversation_so_far(turns, prompt[1], where)
    return Judged(asked, answer(*reply, where), good_or_bad(*good, where))


def several(value: object, path: Path, where: str) -> list[Answer]:
    """Two or more answers, each a string, a message or messages."""
    found = listed(value, path, where, of="answers")
    if len(found) < 2:
        raise FieldError(
            f"{dotted(path)} holds {len(found)} answer", path=path, allowed="expected two or more", where=where
        )
    return [answer(one, (*path, index), where) for index, one in enumerate(found)]


def is_turns(value: object) -> bool:
    """Whether a value is a list of message objects."""
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Mapping)


