"""A conversation that is too long: what is left of it where its beginning is cut away.

Idea: what a model is to learn is its last answer and what stands right before it, so the left goes, but for BOS.

Use through the renderer of causal decoders.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from luthier.data.rendering.rendered import Rendered
from luthier.data.rendering.shown import Notice
from luthier.data.rendering.spans import leading
from luthier.data.rendering.weighed import Trained


def beginning_cut(
    view: Rendered, trained: Sequence[Trained], limit: int, *, bos: int | None, notice: Notice
) -> Rendered | None:
    """The last `limit` tokens up to the last trained one, behind BOS; None when the answer does not fit."""
    begin, end = (0, 0) if bos is None else leading(view.tokens, view.spans, view.text, bos)
    head = end - begin
    stop = trained[-1].stop
    start = max(stop - (limit - head), end)
    while end < start < stop and view.spans[start, 0] < view.spans[start - 1, 1]:
        start += 1  # not in the middle of a character
    # Without BOS one token of context must stay: the first token of an answer needs something that predicts it.
    first = start if head else start + 1
    if trained[-1].start < first:
        return None
    weights = view.weights.copy()
    for turn in trained[:-1]:
        if turn.start < first:
            weights[turn.start : turn.stop] = 0.0
            notice("an earlier answer was cut away by truncation")
    # White space before BOS is part of the beginning that goes.
    keep = np.concatenate([np.arange(begin, end), np.arange(start, stop)])
    weights = weights[keep]
    weights[: max(head, 1)] = 0.0
    return Rendered(view.row, view.text, view.tokens[keep], weights, view.roles[keep], view.spans[keep])
