"""The split: which rows are held out of training, with all copies of a row on one side.

Idea: rows are drawn in an order that depends on the seed alone. Where rows have copies, a row is drawn with all of
them, so that nothing the model is judged by has been trained on; where there are none, it is a plain draw.
Rows that are reserved are drawn first, and are those that a split without a reserve would hold out: what is chosen by
one run's held-out rows can be judged by another's.
Where rows have classes, a class of which the draw would leave no row in training gets one back: it could not be
learned, and rows of it could not be judged.
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
    train_rows: NDArray[np.bool_]
    train_views: NDArray[np.bool_]
    notices: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, rows: Ids, view_rows: Ids, chosen: Ids, *, reserved: Ids | None = None, notices: tuple[str, ...] = ()
    ) -> Split:
        """The split that holds out the rows `chosen`, and trains on all others but the `reserved` ones."""
        gone = chosen if reserved is None else np.concatenate([chosen, reserved])
        held = np.isin(rows, chosen), np.isin(view_rows, chosen)
        return cls(*held, ~np.isin(rows, gone), ~np.isin(view_rows, gone), notices)

    @classmethod
    def of_pieces(cls, count: int, fraction: float, *, reserve: float = 0.0) -> Split:
        """One long text: its pieces share no token, so the last ones can be held out, and those before a reserve."""
        end = count - _share(count, reserve)
        start = end - _share(end, fraction)
        pieces = np.arange(count)
        return cls(np.zeros(1, np.bool_), (start <= pieces) & (pieces < end), np.ones(1, np.bool_), pieces < start)


def split(
    rows: Ids,
    view_rows: Ids,
    groups: NDArray[np.int64] | None,
    *,
    fraction: float,
    seed: int,
    reserve: float = 0.0,
    alike: str = "copies",
    classes: tuple[Ids, Ids] | None = None,
) -> Split:
    """Hold out a `fraction` of the rows, at least one where that is possible; `groups` says which are `alike`.

    A share `reserve` is set aside before: neither trained nor held out. `classes` are rows and a class of each, where
    rows have some: a row comes as often as it has classes.
    """

    def draw(some: Ids, some_groups: NDArray[np.int64] | None, share: float) -> tuple[Ids, tuple[str, ...]]:
        chosen, notices = _draw(some, some_groups, share, seed=seed, alike=alike)
        back = _given_back(some, some_groups, chosen, classes) if classes is not None else chosen[:0]
        if len(back) == 0:
            return chosen, notices
        told = f"{len(back):,} rows that were drawn for evaluation stay in training: no other row there has their class"
        return np.setdiff1d(chosen, back), (*notices, told)

    if reserve == 0:
        chosen, notices = draw(rows, groups, fraction)
        return Split.of(rows, view_rows, chosen, notices=notices)
    reserved, _ = draw(rows, groups, reserve)
    left = np.flatnonzero(~np.isin(rows, reserved))
    chosen, notices = draw(rows[left], None if groups is None else groups[left], fraction)
    told = f"{len(reserved):,} rows are reserved: neither trained nor evaluated (evaluation.reserve)"
    return Split.of(rows, view_rows, chosen, reserved=reserved, notices=(told, *notices))


def _draw(
    rows: Ids, groups: NDArray[np.int64] | None, fraction: float, *, seed: int, alike: str
) -> tuple[Ids, tuple[str, ...]]:
    """The rows that are drawn, and what there is to say of them."""
    count = round(fraction * len(rows))
    if fraction > 0 and len(rows) > 1:
        count = max(1, min(count, len(rows) - 1))
    order = np.random.default_rng([seed, _DRAW]).permutation(rows)
    if groups is None or count == 0:
        return order[:count], ()
    chosen = _by_groups(groups, groups[np.searchsorted(rows, order)], count)
    held = int(np.isin(groups, chosen).sum())
    others = len(rows) - len(np.unique(groups))
    notice = f"{others:,} rows are {alike} of others; {alike} stay on one side of the split"
    if held == 0:
        notice = f"all rows are {alike} of one another, so none is held out; name other rows: data.evaluation"
    elif held != count:
        notice += f", so {held:,} rows are held out instead of {count:,}"
    return rows[np.isin(groups, chosen)], (notice,)


def _given_back(
    rows: Ids, groups: NDArray[np.int64] | None, chosen: Ids, classes: tuple[Ids, Ids]
) -> Ids:
    """Of the `chosen` of these rows the first of each class that no other has, each with those of its group."""
    owners, numbers = classes
    drawn = np.isin(owners, chosen)
    trained = set(numbers[np.isin(owners, rows) & ~drawn].tolist())
    found: set[int] = set()
    for owner, number in zip(owners[drawn].tolist(), numbers[drawn].tolist(), strict=True):
        if number in trained:
            continue
        together = np.array([owner]) if groups is None else rows[groups == groups[np.searchsorted(rows, owner)]]
        found.update(together.tolist())
        trained.update(numbers[np.isin(owners, together)].tolist())
    return np.array(sorted(found), dtype=np.int64)


def _share(count: int, fraction: float) -> int:
    return min(max(1, round(fraction * count)), count - 1) if fraction > 0 else 0


def _by_groups(groups: NDArray[np.int64], drawn: NDArray[np.int64], count: int) -> list[int]:
    """Whole groups in the order they are drawn, as far as they fit into `count`; the smallest when none fits."""
    names, sizes = np.unique(groups, return_counts=True)
    size_of = np.zeros(int(names[-1]) + 1, np.int64)
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
