"""The trained turns of a view, and the role and the weight of each token, where C++ can tell all of them.

Use through the renderer of causal decoders, which does the same in Python for rows that are not as nearly all are, and
says there what is wrong with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from luthier.data.forest import Floats, Ints
from luthier.data.rendering.shown import Shown
from luthier.data.rendering.spans import roles_of
from luthier.data.rendering.turns import View
from luthier.data.tokenizer import Tokenizer
from luthier.kernels.rows import NativeRows, Rows, Turns


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
    prompts: Sequence[Ints],
    tokenizer: Tokenizer,
    rows: NativeRows,
) -> tuple[NDArray[np.uint8], Floats, list[Trained]] | None:
    """Roles (n,), weights (n,) and turns of a view's tokens (n,), whose answers follow these prompts (p,).

    None where a turn does not end in a stop token that is known, or has one within.
    """
    one, answers = Rows.of(tokens, spans, np.empty(len(tokens), np.float32)), view.answers
    if one is None or not view.bounds:
        return None
    turns = Turns(
        bounds=[end for end, _ in view.bounds],
        roles=roles_of(view, shown),
        bound_stops=[len(view.bounds)],
        prompts=np.concatenate([np.empty(0, np.int32), *prompts]),
        prompt_start=0,
        prompt_ends=np.cumsum([len(prompt) for prompt in prompts], dtype=np.int64),
        endings=[answer.ending for answer in answers],
        behinds=[answer.stop for answer in answers],
        weights=[answer.weight for answer in answers],
        answer_stops=[len(answers)],
    )
    bos = tokenizer.bos_id if tokenizer.adds_bos else None
    made = rows.weigh(one, turns, stops=tokenizer.stop_ids, ends=tokenizer.specials.ends, bos=bos)
    if not made.known[0]:
        return None
    trained = [
        Trained(len(prompt), stop + 1, answer.weight)
        for prompt, stop, answer in zip(prompts, made.stops.tolist(), answers, strict=True)
    ]
    return made.roles, made.weights, trained
