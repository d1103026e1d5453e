"""The split: which rows are held out of training, with all copies of a row on one side.

Idea: rows are drawn in an order that depends on the seed alone. Where rows have copies, a row is drawn with all of
them, so that nothing the model is judged by has been trained on; where there are none, it is a plain draw.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.integer]
_DRAW = 0x5EED


@final
@dataclass(frozen=True)
class Split:
    """The held-out rows, among the rows and among the views, and what there is to say of them."""

    held_rows: NDArray[np.bool_]
    held_views: NDArray[np.bool_]
    notices: tuple[str, ...] = ()

    @classmethod
    def of(cls, rows: Ids, view_rows: Ids, chosen: Ids, *, notices: tuple[str, ...] = ()) -> Split:
        """The split that holds out the rows `chosen`."""
        return cls(np.isin(rows, chosen), np.isin(view_rows, chosen), notices)

    @classmethod
    def of_pieces(cls, count: int, fraction: float) -> Split:
        """One long text: its pieces share no token, so the last ones can be held out."""
        share = min(max(1, round(fraction * count)), count - 1) if fraction > 0 else 0
        return cls(np.zeros(1, np.bool_), np.arange(count) >= count - share)


def split(rows: Ids, view_rows: Ids, groups: NDArray[np.int64] | None, *, fraction: float, seed: int) -> Split:
    """Hold out a `fraction` of the rows, at least one where that is possible; `groups` says which are copies."""
    count = round(fraction * len(rows))
    if fraction > 0 and len(rows) > 1:
        count = max(1, min(count, len(rows) - 1))
    order = np.random.default_rng([seed, _DRAW]).permutation(rows)
    if groups is None or count == 0:
        return Split.of(rows, view_rows, order[:count])
    chosen = _by_groups(groups, groups[np.searchsorted(rows, order)], count)
    held = int(np.isin(groups, chosen).sum())
    copies = len(rows) - len(np.unique(groups))
    notice = f"{copies:,} rows are copies of others; copies stay on one side of the split"
    if held == 0:
        notice = "every row is a copy of one and the same, so none is held out; name other rows: data.evaluation"
    elif held != count:
        notice += f", so {held:,} rows are held out instead of {count:,}"
    return Split.of(rows, view_rows, rows[np.isin(groups, chosen)], notices=(notice,))


def _by_groups(groups: NDArray[np.int64], drawn: NDArray[np.int64], count: int) -> list[int]:
    """Whole groups in the order they are drawn, as far as they fit into `count`; the smallest when none fits."""
    names, sizes = np.unique(groups, return_counts=True)
    size_of = np.zeros(len(groups), np.int64)
    size_of[names] = sizes
    chosen: list[int] = []
    seen: set[int] = set()
    for group in drawn.tolist():
        if count == 0:
            break
        size = int(size_of[group])
        if group not in seen and size <= count:
            chosen.append(group)
            count -= size
        seen.add(group)
    if not chosen and len(names) > 1:
        return [int(drawn[np.argmin(size_of[drawn])])]
    return chosen
