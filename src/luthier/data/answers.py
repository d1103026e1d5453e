"""What an encoder-decoder reads and says, out of a rendered row: the text, and each answer with its start token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from luthier.core.errors import DataError
from luthier.data.forest import Floats, Ints, Segment
from luthier.data.rendering.rendered import TOKEN_ROLES, Rendered

_TEMPLATE, _RIGHT = TOKEN_ROLES.index("template"), TOKEN_ROLES.index("assistant")


@dataclass(frozen=True)
class Answer:
    """One answer: `tokens` (n,) with the decoder's start token in front, the `weights` of the row, and whether it is
    the right one."""

    tokens: Ints
    weights: Floats
    right: bool


def text_and_answers(view: Rendered) -> tuple[Segment, list[Answer]]:
    """The segment that the encoder reads, and the answers to it. Raises DataError for a row that has none."""
    answers = np.isin(view.roles, [_RIGHT, TOKEN_ROLES.index("wrong")])
    starts = np.flatnonzero((view.roles[:-1] == _TEMPLATE) & answers[1:])
    if len(starts) == 0 or starts[0] == 0:
        raise DataError(
            f"row {view.row} has no {'text' if len(starts) else 'answer'}",
            allowed="a text and an answer to it, as a prompt and a completion",
        )
    nothing = np.zeros(int(starts[0]), dtype=np.float32)
    read = Segment(view.tokens[: starts[0]], nothing, both_ways=True)
    ends = [*starts[1:].tolist(), len(view.tokens)]
    found = [
        Answer(view.tokens[start:end], view.weights[start:end], bool(view.roles[start + 1] == _RIGHT))
        for start, end in zip(starts.tolist(), ends, strict=True)
    ]
    return read, found
