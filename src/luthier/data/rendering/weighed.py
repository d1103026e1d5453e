"""The trained turns of a view: with role and weight of each token where C++ can tell all of them, or one by one.

Use through the renderer of causal decoders: what C++ does not tell, of rows that are not as nearly all are, is found
turn by turn, which says what is wrong with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from luthier.core.errors import DataError, TemplateError
from luthier.data.forest import Floats, Ints
from luthier.data.rendering.shown import Shown
from luthier.data.rendering.spans import roles_of
from luthier.data.rendering.turns import Answer, View
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


def trained_turn(tokens: Ints, spans: Ints, answer: Answer, *, start: int, tokenizer: Tokenizer) -> Trained:
    """The tokens of an answer that begins with token number `start`, up to the one that ends it.

    Raises TemplateError when there is no such token, DataError when there is one within.
    """
    ids, stops = tokenizer, tokenizer.stop_ids
    begins = spans[start:, 0]
    behind = (begins >= answer.ending).nonzero()[0]
    tail: list[int] = []
    for index, begin in zip(behind.tolist(), begins[behind].tolist(), strict=True):
        if begin >= answer.stop:
            break
        tail.append(start + index)
    known = [index for index in tail if int(tokens[index]) in stops]
    special = [index for index in tail if int(tokens[index]) in stops or int(tokens[index]) in ids.specials.ends]
    if not special:
        # An answer that ends in nothing teaches a model that never stops.
        text = ids.decode(tokens[tail])
        raise TemplateError(
            f"the answer of message {answer.message + 1} ends in "
            + (f"{text!r}, which is no single control token of this tokenizer" if text else "nothing"),
            allowed="an answer that ends in the end-of-text token or another control token",
            do="choose another template with data.template (such as instruction), or add the token as a special "
            "token to the tokenizer",
        )
    # Tool calls may close with control tokens of their own before the turn ends.
    at = (known[0] if known else special[-1]) if answer.calls else special[0]
    stop = int(tokens[at])
    within = tokens[start:at].tolist()
    ends = stops if stop in stops else stops | {stop}
    if not ends.isdisjoint(within):
        early = next(token for token in within if token in ends)
        raise DataError(
            f"the answer of message {answer.message + 1} contains {ids.token_text(early)!r}, "
            "at which generation stops",
            do="take that text out of the answer, or choose a template with another end of turn",
        )
    return Trained(start, at + 1, answer.weight)
