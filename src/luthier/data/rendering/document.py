"""Documents: texts without turns, all of which is trained, cut into consecutive pieces where they are long.

Idea: each token of a document is predicted exactly once. A piece therefore begins with the last character of the one
before it, which carries no loss there. A text ends in the end-of-text token, so that the model learns to stop.

Use through `Renderer`.
"""

from __future__ import annotations

import numpy as np

from luthier.data.forest import Ints
from luthier.data.rendering.rendered import TOKEN_ROLES, Rendered
from luthier.data.rendering.shown import Notice
from luthier.data.rendering.spans import whole_character
from luthier.data.tokenizer import Tokenizer


def document(
    row: int, text: str, encoded: tuple[Ints, Ints], tokenizer: Tokenizer, longest: int | None, *, notice: Notice
) -> list[Rendered]:
    """The views of the row `row`, which is `text`: one, or several of at most `longest` tokens.

    `encoded` are the tokens (n,) of the text and their spans (n, 2), which cover it.
    """
    tokens, spans = _ended(text, encoded, tokenizer, notice)
    bos = np.array([tokenizer.bos_id], np.int32) if tokenizer.adds_bos else np.zeros(0, np.int32)
    made: list[Rendered] = []
    start = 0
    while start < len(tokens):
        # The piece before hands over its last character, unweighted, so that every token is predicted once.
        before = max(whole_character(spans, start - 1), start - 4) if start else 0
        room = (longest or len(tokens) + 1) - len(bos) - (start - before)
        stop = len(tokens) if start + room >= len(tokens) else whole_character(spans, start + room)
        stop = stop if stop > start else start + room
        weights = np.ones(len(bos) + stop - before, np.float32)
        weights[: max(len(bos) + start - before, 1 if start == 0 else 0)] = 0.0
        marks = np.full((len(bos), 2), spans[before, 0], np.int32)
        roles = np.full(len(weights), TOKEN_ROLES.index("text"), np.uint8)
        roles[: len(bos)] = TOKEN_ROLES.index("template")
        ids = np.concatenate([bos, tokens[before:stop]])
        made.append(Rendered(row, text, ids, weights, roles, np.concatenate([marks, spans[before:stop]])))
        start = stop
    return made


def _ended(
    text: str, encoded: tuple[Ints, Ints], tokenizer: Tokenizer, notice: Notice
) -> tuple[Ints, Ints]:
    """The tokens of a text and their spans: without BOS before them, with the end-of-text token behind them."""
    tokens, spans = encoded
    if tokenizer.adds_bos and len(tokens) and tokens[0] == tokenizer.bos_id:
        tokens, spans = tokens[1:], spans[1:]
    eos = tokenizer.eos_id
    if eos is None:
        notice("the tokenizer has no end-of-text token, so texts end without one")
    elif not len(tokens) or tokens[-1] != eos:
        tokens = np.append(tokens, np.int32(eos))
        spans = np.concatenate([spans, np.full((1, 2), len(text), np.int32)])
    return tokens, spans
