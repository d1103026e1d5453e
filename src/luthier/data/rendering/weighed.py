"""The trained turns of a view, and the role and the weight of each token, where C++ can tell all of them.

Use through the renderer of causal decoders, which does the same in Python for rows that are not as nearly all are, and
says there what is wrong with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import starmap

import numpy as np
from numpy.typing import NDArray

from luthier.data.forest import Floats, Ints
from luthier.data.rendering.shown import Shown
from luthier.data.rendering.spans import roles_of
from luthier.data.rendering.turns import View
from luthier.data.tokenizer import Tokenizer
from luthier.kernels.rows import NativeRows, Turns


@dataclass(frozen=True, slots=True)
class Trained:
    """The tokens [start, stop) of a trained turn, its stop token last."""

    start: int
    stop: int
    weight: float


def weighed(
    tokens: Ints,
    spans: Ints,
    *,
    view: View,
    shown: Sequence[Shown],
    starts: Sequence[int],
    tokenizer: Tokenizer,
    rows: NativeRows,
) -> tuple[NDArray[np.uint8], Floats, list[Trained]] | None:
    """Roles (n,), weights (n,) and turns of a view's tokens (n,), whose answers begin at the tokens `starts`.

    None where a turn does not end in a stop token that is known, or has one within.
    """
    answers = view.answers
    weights = [answer.weight for answer in answers]
    turns = Turns(
        [end for end, _ in view.bounds],
        roles_of(view, shown),
        starts,
        [answer.ending for answer in answers],
        [answer.stop for answer in answers],
        weights,
    )
    bos = tokenizer.bos_id if tokenizer.adds_bos else None
    made = rows.weigh(tokens, spans, turns, stops=tokenizer.stop_ids, ends=tokenizer.specials.ends, bos=bos)
    if made is None:
        return None
    roles, own, stops = made
    behind = [stop + 1 for stop in stops]
    return roles, own, list(starmap(Trained, zip(starts, behind, weights, strict=True)))
