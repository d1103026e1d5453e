"""Several answers to one prompt as one row of tokens: the prompt once, then each answer up to its stop token.

Idea: a prompt and an answer are rendered together, as inference would see them, and the ids of the prompt are the same
for all of its answers; so they need to stand there, and to be computed, only once. What the template writes behind the
end of a turn belongs to no answer and is left out.

Cut to a limit, it is the prompt that loses its beginning, once for all answers: they stay comparable, and none loses
the end that it is judged by. The limit is for the longest way through prompt and answer: that is what positions count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from luthier.core.errors import DataError
from luthier.data.forest import Ints
from luthier.data.rendering.rendered import TOKEN_ROLES, Rendered
from luthier.data.rendering.spans import leading

_RIGHT, _WRONG = TOKEN_ROLES.index("assistant"), TOKEN_ROLES.index("wrong")
MOST_ANSWERS = 255
"""Answers to one prompt that can be told apart."""


@dataclass(frozen=True, slots=True)
class Part:
    """A prompt with one of its answers: `view`, in which the answer is the tokens [start, stop), from character `at`
    on."""

    view: Rendered
    start: int
    stop: int
    at: int


def joined(row: int, parts: Sequence[Part], right: Sequence[bool], scores: Sequence[float] | None) -> Rendered:
    """One view of all parts, which share their prompt; `right` says of each answer whether it is a good one.

    Raises DataError for answers that are the same.
    """
    first = parts[0]
    prompt = first.view.tokens[: first.start]
    tokens, weights, roles, spans = [prompt], [first.view.weights[: first.start]], [first.view.roles[: first.start]], []
    spans.append(first.view.spans[: first.start])
    numbers, marks = [np.zeros(first.start, np.uint8)], [np.zeros(first.start, np.float32)]
    text = first.view.text[: first.at]
    known: set[bytes] = set()
    for place, part in enumerate(parts):
        if not np.array_equal(part.view.tokens[: part.start], prompt):
            raise DataError(
                f"answer {place + 1} stands behind other tokens than the first one", allowed="one prompt for all",
                do="report this as a defect",
            )  # fmt: skip
        own = slice(part.start, part.stop)
        if (said := part.view.tokens[own].tobytes()) in known:
            raise DataError(
                f"answer {place + 1} has the same tokens as another one, so that neither is better",
                allowed="answers that differ",
                do="take the row out, or set data.on_bad_row to skip",
            )
        known.add(said)
        count = part.stop - part.start
        tokens.append(part.view.tokens[own])
        weights.append(part.view.weights[own])
        own_roles = part.view.roles[own].copy()
        if not right[place]:
            own_roles[own_roles == _RIGHT] = _WRONG
        roles.append(own_roles)
        spans.append(part.view.spans[own] + np.int32(len(text) - part.at))
        numbers.append(np.full(count, place + 1, np.uint8))
        marks.append(np.full(count, 0.0 if scores is None else scores[place], np.float32))
        text += part.view.text[part.at : int(part.view.spans[own, 1].max())]
    return Rendered(
        row,
        text,
        np.concatenate(tokens),
        np.concatenate(weights),
        np.concatenate(roles),
        np.concatenate(spans).astype(np.int32),
        answers=np.concatenate(numbers),
        scores=None if scores is None else np.concatenate(marks),
    )


def longest(view: Rendered) -> int:
    """The tokens of the prompt and of its longest answer together."""
    counts = np.bincount(_numbers(view))
    return int(counts[0] + counts[1:].max(initial=0))


def shortened(view: Rendered, limit: int, bos: int | None) -> Rendered | None:
    """The view with the beginning of its prompt cut away, so that the longest way has `limit` tokens; None where an
    answer alone is too long. A leading `bos` stays, but for white space before it."""
    numbers = _numbers(view)
    prompt = int(np.count_nonzero(numbers == 0))
    begin, end = (0, 0) if bos is None else leading(view.tokens, view.spans, view.text, bos)
    start = max(end + longest(view) - begin - limit, end)
    while end < start < prompt and view.spans[start, 0] < view.spans[start - 1, 1]:
        start += 1  # not in the middle of a character
    # What predicts the first token of an answer has to stay.
    if start >= prompt and not (end and start == prompt):
        return None
    keep: Ints = np.concatenate([np.arange(begin, end), np.arange(start, len(view.tokens))]).astype(np.int32)
    return replace(
        view,
        tokens=view.tokens[keep],
        weights=view.weights[keep],
        roles=view.roles[keep],
        spans=view.spans[keep],
        answers=numbers[keep],
        scores=None if view.scores is None else view.scores[keep],
    )


def _numbers(view: Rendered) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.zeros(len(view.tokens), np.uint8) if view.answers is None else view.answers
