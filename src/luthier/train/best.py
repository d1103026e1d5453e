"""Whether an evaluation is better than the best before it: decided over the same rows, or not at all.

Idea: rows whose answers nobody could score are in no mean, so of two means the better one may only have had the easier
rows. Two evaluations are compared over the rows that the best one has scored. One that lacks any of these is not
compared, and the best before it stays; one that has scored more is compared over those of the best alone.
"""

from __future__ import annotations

import math

from luthier.train.pass_report import PassReport
from luthier.train.state import LoopState


def is_better(state: LoopState, report: PassReport) -> bool | None:
    """Whether what was evaluated is better than the best so far; None where it cannot be compared."""
    if not math.isfinite(report.loss):
        return False
    if state.best_eval_loss is None:
        return True
    if not state.best_rows:
        # The best one has scored every row.
        return None if report.unscored else report.loss < state.best_eval_loss
    own = _means(report)
    if not state.best_rows.keys() <= own.keys():
        return None
    return math.fsum(own[row] for row in state.best_rows) < math.fsum(state.best_rows.values())


def take_best(state: LoopState, report: PassReport) -> None:
    """Keep an evaluation as the best so far."""
    state.best_eval_loss, state.best_step = report.loss, state.step
    state.metrics["best"] = report.figures
    state.best_rows = _means(report) if report.unscored else {}


def _means(report: PassReport) -> dict[int, float]:
    return {row: loss / weight for row, (loss, weight) in report.row_losses.items()}
