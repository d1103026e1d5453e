"""Whether an evaluation is the best so far: by the same rows, or not at all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest

from luthier.train.best import is_better, take_best
from luthier.train.pass_report import PassReport
from luthier.train.state import LoopState


def scored(losses: Mapping[int, float], *, lost: int = 0) -> PassReport:
    """An evaluation with the losses of these rows, and others that could not be scored."""
    rows = {row: (loss, 1.0) for row, loss in losses.items()}
    unscored = {"the reward gave None": lost} if lost else {}
    return PassReport(math.fsum(losses.values()), float(len(rows)), 9, 9, rows, unscored=unscored)


def after(*reports: PassReport) -> LoopState:
    """The state after these evaluations, one of each step."""
    state = LoopState()
    for report in reports:
        state.step += 1
        if is_better(state, report):
            take_best(state, report)
    return state


ALL, EASY, HARD = scored({1: -2.0, 2: -6.0, 3: -1.0}), scored({2: -8.0}, lost=2), scored({1: -3.0, 3: -2.0}, lost=1)


@pytest.mark.parametrize(
    ("before", "now", "better"),
    [
        (ALL, scored({1: -2.0, 2: -6.0, 3: -2.0}), True),
        (ALL, scored({1: -2.0, 2: -6.0, 3: -1.0}), False),
        (ALL, EASY, None),  # 8 is more than 3, of another row
        (EASY, HARD, None),
        (EASY, scored({2: -9.0}, lost=2), True),
        # What has scored more is compared over the rows of the best: 6 is less than 8, and 9 more.
        (EASY, ALL, False),
        (EASY, scored({1: 0.0, 2: -9.0}, lost=1), True),
        (HARD, ALL, False),
        (ALL, replace(ALL, loss_sum=math.nan), False),
    ],
)  # fmt: skip
def test_means_are_compared_over_the_same_rows(before: PassReport, now: PassReport, better: bool | None) -> None:
    """Breaks when a checkpoint is called better since the hard rows were not scored."""
    assert is_better(after(before), now) is better


def test_what_cannot_be_compared_leaves_the_best_as_it_was() -> None:
    """Breaks when the rows of the best are forgotten, or a best one that has scored all is said to lack some."""
    state = after(EASY, HARD)
    assert state.best_step == 1 and state.best_eval_loss == -8.0 and state.best_rows == {2: -8.0}
    state = after(EASY, scored({1: 0.0, 2: -9.0, 3: 0.0}), HARD)
    assert state.best_step == 2 and state.best_eval_loss == -3.0 and state.best_rows == {}
