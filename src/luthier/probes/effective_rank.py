"""Effective rank: how many directions a change really has.

Idea: the rank of an adapter says how many directions a change may have, its singular values how many it uses. Where an
update of rank 64 has the effective rank of 3, a smaller one would have done; where it uses all it may, more might help.
Equation: exp(-sum_i p_i ln p_i) with p_i = sigma_i / sum_j sigma_j; stable rank = ||dW||_F^2 / sigma_1^2; rank for a
    share = the fewest directions that hold it of ||dW||_F^2.
Source: Roy and Vetterli, EUSIPCO 2007, section 2; for updates: Biderman et al., arXiv 2405.09673, section 4.5.
Cost: decompositions of the thin factors of a low-rank change; of a whole one, all its singular values.
Use when: a rank is to be chosen for the next run, or full tuning is to be compared with low-rank tuning.
Not when: a change is next to nothing: noise has a high effective rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from luthier.maths.spectra import effective_rank, of_factors, stable_rank
from luthier.model.comparing.pair import Change, Pair, by_layer_and_role
from luthier.probes import Grid, Probe, Report, Table, Value


@final
class EffectiveRank(Probe):
    """The effective, stable and 99 % rank of every change."""

    needs: ClassVar[frozenset[str]] = frozenset({"weights"})

    share: float = Field(0.99, gt=0, lt=1, description="part of the squared norm that the counted directions hold")

    def look(self, pair: Pair) -> Report:
        found = [self._one(change) for change in pair.matrices("effective_rank")]
        found = [one for one in found if one.stable]
        if not found:
            sentence = "Of the linear layers none differs from the base: their change has rank 0."
            return Report(verdict=(sentence,), numbers={"effective_rank": 0.0})
        ranks = sorted(one.effective for one in found)
        middle, room = ranks[len(ranks) // 2], max(one.most for one in found)
        return Report(
            verdict=(self._said(found, middle),),
            numbers={
                "effective_rank": middle,
                "largest_effective_rank": ranks[-1],
                "stable_rank": sorted(one.stable for one in found)[len(found) // 2],
                "rank_allowed": room,
            },
            tables=(_by_role(found, self.share),),
            grids=_grids(found),
        )

    def flops(self, pair: Pair) -> float:
        whole = [sorted(change.shape) for change in pair.changes if change.linear and change.factors is None]
        return sum(8.0 * small * small * large for small, large in whole)

    @torch.no_grad()
    def _one(self, change: Change) -> Ranks:
        sizes = of_factors(*change.factors).sizes if change.factors is not None else _sizes(change.delta())
        held = sizes.double().square().cumsum(0)
        wanted = int((held < self.share * held[-1]).sum()) + 1 if float(held[-1]) else 0
        return Ranks(change, effective_rank(sizes), stable_rank(sizes), wanted, len(sizes))

    def _said(self, found: Sequence[Ranks], middle: float) -> str:
        low = all(one.change.factors is not None for one in found)
        most = sorted(one.most for one in found)[len(found) // 2]
        wanted = sorted(one.wanted for one in found)[len(found) // 2]
        start = f"The middle change has an effective rank of {middle:.3g} of the {most} it may have"
        held = f"; {wanted} directions hold {100 * self.share:.0f} % of its square."
        if not low:
            return start + held
        if wanted <= most / 3:
            return f"{start}{held} A rank of {max(1, wanted)} would have room for it."
        if middle > 0.8 * most:
            return f"{start}{held} It uses all it has: a higher rank may learn more."
        return start + held


@final
@dataclass(frozen=True)
class Ranks:
    """What one change has: effective and stable rank, directions for the share, and how many it may have."""

    change: Change
    effective: float
    stable: float
    wanted: int
    most: int


def _sizes(delta: Float[Tensor, "out in"]) -> Float[Tensor, " n"]:
    return torch.linalg.svdvals(delta)


def _by_role(found: Sequence[Ranks], share: float) -> Table:
    rows: list[list[Value]] = []
    for role in dict.fromkeys(one.change.role for one in found):
        own = [one for one in found if one.change.role == role]
        effective, stable = (sum(each) / len(own) for each in ([o.effective for o in own], [o.stable for o in own]))
        rows.append([role, len(own), effective, stable, max(one.wanted for one in own), own[0].most])
    heads = ("role", "matrices", "effective rank", "stable rank", f"most for {100 * share:.0f} %", "allowed")
    return Table(title="Mean ranks by role", heads=heads, rows=rows)


def _grids(found: Sequence[Ranks]) -> tuple[Grid, ...]:
    rows, columns, values = by_layer_and_role([(one.change, one.effective) for one in found])
    title = "Effective rank of the change, by layer and role"
    return (Grid(title=title, rows=rows, columns=columns, values=values),) if rows else ()
