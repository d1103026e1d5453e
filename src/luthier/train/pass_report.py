"""What a pass over some trees has found: sums, and the losses of rows, so that means stay exact however it was cut."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from luthier.model.running.outputs import LossReport, TokenOutputs
from luthier.train.shortage import Split


@dataclass(frozen=True)
class PassReport:
    """What a forward (and backward) pass over some trees found: sums, not means.

    `splits` says how often micro-batches were made smaller on the way; `metrics` are an objective's own, each a sum and
    its weight, and `most` those of which the largest counts. `unscored` are rows that could not be measured, by reason.
    """

    loss_sum: float
    weight: float
    tokens: int
    trained_tokens: int
    row_losses: dict[int, tuple[float, float]]
    splits: tuple[Split, ...] = ()
    metrics: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    most: Mapping[str, float] = field(default_factory=dict)
    unscored: Mapping[str, int] = field(default_factory=dict)

    @property
    def figures(self) -> dict[str, float]:
        """The objective's own metrics as single numbers."""
        means = {name: total / weight for name, (total, weight) in self.metrics.items() if weight}
        return {**means, **self.most}

    @property
    def loss(self) -> float:
        """The mean loss over the weight; NaN when there is none, never 0."""
        return self.loss_sum / self.weight if self.weight else math.nan


def add_up(reports: Sequence[PassReport]) -> PassReport:
    """The report of all passes together."""
    rows: dict[int, tuple[float, float]] = {}
    for report in reports:
        for row, (loss, weight) in report.row_losses.items():
            before = rows.get(row, (0.0, 0.0))
            rows[row] = (before[0] + loss, before[1] + weight)
    return PassReport(
        loss_sum=_sum([report.loss_sum for report in reports]),
        weight=math.fsum(report.weight for report in reports),
        tokens=sum(report.tokens for report in reports),
        trained_tokens=sum(report.trained_tokens for report in reports),
        row_losses=rows,
        splits=tuple(split for report in reports for split in report.splits),
        metrics=_summed([report.metrics for report in reports]),
        most=_largest([report.most for report in reports]),
        unscored=sum((Counter(report.unscored) for report in reports), Counter[str]()),
    )


def _largest(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for each in found for name in each)
    return {name: max(each[name] for each in found if name in each) for name in names}


def _summed(found: Sequence[Mapping[str, tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    names = dict.fromkeys(name for each in found for name in each)
    pairs = {name: [each[name] for each in found if name in each] for name in names}
    return {name: (_sum([one for one, _ in each]), _sum([one for _, one in each])) for name, each in pairs.items()}


def report_of(loss: LossReport, tokens: int, outputs: TokenOutputs) -> PassReport:
    """The report of one pass with this loss and these outputs."""
    rows = outputs.rows.cpu().numpy()
    weights = outputs.weights.cpu().numpy().astype(np.float64)
    if loss.tree_losses is None:
        losses = -outputs.log_probs.detach().cpu().numpy().astype(np.float64) * weights
    else:
        of_tree = loss.tree_losses.detach().cpu().numpy().astype(np.float64)
        trees = outputs.trees.cpu().numpy()
        # A tree's loss lies on its tokens by their weight: those of a row then add up to it.
        whole = np.bincount(trees, weights, minlength=len(of_tree))
        losses = (of_tree / np.where(whole == 0, 1, whole))[trees] * weights
    by_row = _by_row(rows, losses, weights)
    total = float(loss.sum.detach())
    return PassReport(total, loss.weight, tokens, len(rows), by_row, metrics=loss.metrics, most=loss.most)


def _sum(losses: Sequence[float]) -> float:
    # fsum refuses infinities of both signs; a plain sum makes NaN of them, which is what they are.
    return math.fsum(losses) if all(map(math.isfinite, losses)) else sum(losses)


def _by_row(
    rows: NDArray[np.int64], losses: NDArray[np.float64], weights: NDArray[np.float64]
) -> dict[int, tuple[float, float]]:
    unique, inverse = np.unique(rows, return_inverse=True)
    loss_sums = np.bincount(inverse, losses, minlength=len(unique))
    weight_sums = np.bincount(inverse, weights, minlength=len(unique))
    return {
        int(row): (float(loss), float(weight)) for row, loss, weight in zip(unique, loss_sums, weight_sums, strict=True)
    }
