"""Intruder dimensions: strong directions of a tuned matrix that are like none of its base, counted.

Idea: full fine-tuning mostly turns and stretches the directions a matrix has; low-rank updates often put new ones among
the strongest, and models with many of these were found to forget more. The count is made beside that of a random
change with the same singular values: what any change of this size and rank would have done is no finding. Vectors that
lie mostly in old ones of about their own size may only have turned; they are told apart.
Equation: j is an intruder when max_i |<u0_i, u_j>| < epsilon over all left singular vectors u0 of W0, for the strongest
    k vectors u of W0 + dW; the same with right ones.
Source: Shuttleworth et al., arXiv 2410.21228, definition 3.1 and algorithm 1; the random change is ours.
Cost: a decomposition of each base matrix, once (it is kept under the digest of the matrix), then the leading k vectors
    of W0 + B A without forming it: two products of the base with some twenty vectors a step, and the same for each
    random change.
Use when: a low-rank run forgets, or ranks and scales are to be compared.
Not when: the question is whether it forgets at all: measure that with forgetting. A random direction of d has cosines
    of about sqrt(2 ln d / d) with all others: the count says how spread a vector is, not that it is outside the span.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, final

import torch
from pydantic import Field

from luthier.core.units import percent_text
from luthier.maths.intruders import SIDES, Likeness, Side, likeness, shuffled, shuffled_whole
from luthier.maths.spectra import Spectrum, Summed
from luthier.model.comparing.pair import Change, Pair, by_layer_and_role
from luthier.probes import Concern, Curves, Grid, Probe, Report, Table, Value


@final
class IntruderDimensions(Probe):
    """Leading directions that are like none of the base's."""

    needs: ClassVar[frozenset[str]] = frozenset({"weights"})
    concern: ClassVar[Concern] = "harm"

    k: int = Field(10, ge=1, description="strongest directions of each matrix that are looked at")
    epsilon: float = Field(0.5, gt=0, lt=1, description="a direction whose cosines are all below this is an intruder")
    thresholds: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(strict=False)] = Field(
        (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), description="other values of epsilon that are counted for"
    )
    side: Literal["left", "right", "both"] = Field("both", description="which singular vectors; the verdict is of left")
    controls: int = Field(1, ge=0, le=20, description="random changes with the same singular values to compare with")
    gap: float = Field(0.01, ge=0, lt=1, description="singular values within this share of each other count as equal")
    seed: int = Field(0, ge=0, description="of the random changes")

    def look(self, pair: Pair) -> Report:
        generator = torch.Generator().manual_seed(self.seed)
        found = [self._one(pair, change, generator) for change in pair.matrices("intruder_dimensions")]
        if not found:
            sentence = "Of the linear layers none differs from the base: there is no direction that could be new."
            return Report(verdict=(sentence,), numbers={"intruders": 0})
        total = self._total(found)
        return Report(
            verdict=self._verdict(total),
            numbers=total,
            tables=(self._thresholds(found), _worst(found)),
            curves=tuple(self._curve(found, side) for side in self._sides),
            grids=_grids(found),
        )

    def flops(self, pair: Pair) -> float:
        return sum(_flops(change, self.controls) for change in pair.changes if change.linear)

    @property
    def _sides(self) -> tuple[Side, ...]:
        return SIDES if self.side == "both" else (self.side,)

    def _one(self, pair: Pair, change: Change, generator: torch.Generator) -> Found:
        weight = change.base()
        base = pair.spectra.of(weight)
        own = likeness(base, weight, change.after(), self.k, gap=self.gap)
        random = [likeness(base, weight, _random(weight, change, generator), self.k, gap=self.gap)
                  for _ in range(self.controls)]  # fmt: skip
        return Found(change, own, tuple(random), base.first(1), float(weight.norm()), self.epsilon)

    def _total(self, found: Sequence[Found]) -> dict[str, float | int | str | None]:
        looked = sum(len(one.own.tuned.sizes) for one in found)
        numbers: dict[str, float | int | str | None] = {
            "matrices": len(found), "k": self.k, "epsilon": self.epsilon, "directions": looked,
        }  # fmt: skip
        first = self._sides[0]
        for side in self._sides:
            mark = "" if side == first else f"_{side}"
            numbers[f"intruders{mark}"] = sum(one.count(side, self.epsilon) for one in found)
            numbers[f"only_turned{mark}"] = sum(int(one.own.turned(side, self.epsilon).sum()) for one in found)
            numbers[f"random_change{mark}"] = _mean_random(found, side, self.epsilon) if self.controls else None
        numbers["energy_share"] = sum(one.energy(first) for one in found) / sum(one.norm**2 for one in found)
        return numbers

    def _verdict(self, total: Mapping[str, float | int | str | None]) -> tuple[str, ...]:
        count, looked, random = total["intruders"], total["directions"], total["random_change"]
        side = self._sides[0]
        said = [
            f"{count} of {looked} leading {side} directions ({self.k} in each of {total['matrices']} matrices) are "
            f"intruders: none of the base's directions has a cosine of {self.epsilon:g} or more with them."
        ]
        if random is not None:
            said.append(_compared(int(count or 0), float(random)))
        if turned := total["only_turned"]:
            said.append(
                f"{turned} of them lie mostly in base directions of about their own singular value: those turn into "
                "each other freely, and may be no news."
            )
        if count:
            share = percent_text(float(total["energy_share"] or 0.0))
            said.append(
                f"They hold {share} of the squared norm of the tuned matrices. Whether they are harmful is a "
                "question of forgetting: --mitigate scales them and measures it."
            )
        return tuple(said)

    def _thresholds(self, found: Sequence[Found]) -> Table:
        rows: list[list[float | int | None]] = []
        for epsilon in sorted({*self.thresholds, self.epsilon}):
            row: list[float | int | None] = [epsilon]
            for side in self._sides:
                row.append(sum(one.count(side, epsilon) for one in found))
                row.append(_mean_random(found, side, epsilon) if self.controls else None)
            rows.append(row)
        heads = [head for side in self._sides for head in (f"intruders, {side}", f"random change, {side}")]
        return Table(title="Intruders by threshold", heads=("epsilon", *heads), rows=rows)

    def _curve(self, found: Sequence[Found], side: Side) -> Curves:
        points = sorted({*self.thresholds, self.epsilon})
        lines = {"this change": [(each, float(sum(one.count(side, each) for one in found))) for each in points]}
        if self.controls:
            lines["random change"] = [(each, _mean_random(found, side, each)) for each in points]
        return Curves(title=f"Intruders by threshold, {side}", across="epsilon", up="intruders", lines=lines)


@final
@dataclass(frozen=True)
class Found:
    """One matrix: its likeness to the base, that of random changes, and its size."""

    change: Change
    own: Likeness
    random: tuple[Likeness, ...]
    base: Spectrum
    norm: float
    epsilon: float

    def count(self, side: Side, epsilon: float) -> int:
        """How many intruders it has."""
        return int(self.own.intruders(side, epsilon).sum())

    def energy(self, side: Side) -> float:
        """The squared singular values of its intruders."""
        return float(self.own.tuned.sizes[self.own.intruders(side, self.epsilon)].square().sum())


def _random(weight: torch.Tensor, change: Change, generator: torch.Generator) -> Summed:
    """The base with a random change that has the singular values of the real one."""
    if change.factors is not None:
        return Summed(weight, *shuffled(*change.factors, generator))
    return Summed(weight + shuffled_whole(change.delta(), generator))


def _mean_random(found: Sequence[Found], side: Side, epsilon: float) -> float:
    return sum(
        sum(int(each.intruders(side, epsilon).sum()) for each in one.random) / len(one.random) for one in found
    )


def _compared(count: int, random: float) -> str:
    """What the count means beside that of random changes."""
    if not count and not random:
        return "A random change of the same singular values has none either: the change is too small to show any."
    if count > 1.2 * random + 1:
        return f"A random change with the same singular values has {random:.3g}: these were learned, not bound to come."
    if count < 0.8 * random - 1:
        return f"A random change with the same singular values has {random:.3g}: tuning stayed nearer to the base."
    return f"A random change with the same singular values has {random:.3g}: the size of the change explains the count."


def _worst(found: Sequence[Found]) -> Table:
    """Counts by role, with where they are most."""
    by_role: dict[str, list[Found]] = defaultdict(list)
    for one in found:
        by_role[one.change.role].append(one)
    rows: list[list[Value]] = []
    by_count = sorted(by_role.items(), key=lambda pair: -sum(one.count("left", one.epsilon) for one in pair[1]))
    for role, own in by_count:
        counts = [one.count("left", one.epsilon) for one in own]
        largest = max(range(len(own)), key=counts.__getitem__)
        ratio = max(float(one.own.tuned.sizes[0] / one.base.sizes[0].clamp_min(1e-30)) for one in own)
        rows.append([role, len(own), sum(counts), own[largest].change.name, ratio])
    heads = ("role", "matrices", "intruders", "most in", "largest / base's")
    return Table(title="Left intruders by role", heads=heads, rows=rows)


def _grids(found: Sequence[Found]) -> tuple[Grid, ...]:
    pairs = [(one.change, float(one.count("left", one.epsilon))) for one in found]
    rows, columns, values = by_layer_and_role(pairs)
    return (Grid(title="Left intruders, by layer and role", rows=rows, columns=columns, values=values),) if rows else ()


def _flops(change: Change, controls: int) -> float:
    small, large = sorted(change.shape)
    steps = 60.0 * small * large * 20
    return 20.0 * small * small * large + (1 + controls) * steps
