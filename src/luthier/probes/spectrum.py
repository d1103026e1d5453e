"""Spectrum: singular values before and after, and those of the change.

Idea: where the singular values of a change rise above those that the base has at the same place, the change rules those
directions; where they stay below its smallest ones, it hides among them. The curves of the matrices that moved most
show which it is.
Equation: sigma_i(W0), sigma_i(W0 + dW), sigma_i(dW) for i = 1..count; ratio = sigma_1(dW) / sigma_1(W0).
Source: Shuttleworth et al., arXiv 2410.21228, section 3; for low-rank updates Hu et al., arXiv 2106.09685, section 7.
Cost: that of intruder_dimensions without its random changes: base decompositions are kept and shared.
Use when: intruders were found and their strength is the question.
Not when: there are hundreds of matrices and no time: drift says which ones moved.
"""

from __future__ import annotations

from typing import ClassVar, final

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from luthier.maths.spectra import Summed, leading, of_factors
from luthier.model.comparing.pair import Change, Pair
from luthier.probes import Curves, Probe, Report, Table, Value

Sizes = tuple[Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"]]
"""Singular values of the base, of the tuned matrix and of the change."""


@final
class SingularValues(Probe):
    """Leading singular values before, after, and of the change."""

    needs: ClassVar[frozenset[str]] = frozenset({"weights"})

    count: int = Field(32, ge=1, description="singular values of each matrix")
    shown: int = Field(4, ge=1, le=12, description="matrices that are drawn, those whose change is strongest first")

    def look(self, pair: Pair) -> Report:
        found = [(change, self._one(pair, change)) for change in pair.matrices("spectrum")]
        if not found:
            return Report(verdict=("No linear layer is among what may change.",), numbers={"largest_ratio": 0.0})
        found.sort(key=lambda one: -_ratio(one[1]))
        strongest, sizes = found[0]
        ruled = sum(_ratio(each) > 1 for _, each in found)
        lifted = sum(float(each[1][0]) > 1.05 * float(each[0][0]) for _, each in found)
        return Report(
            verdict=(
                f"In {ruled} of {len(found)} matrices the strongest direction of the change is stronger than any of "
                f"the base; {lifted} have a largest singular value that grew by more than 5 %. Strongest is "
                f"{strongest.name}: {float(sizes[2][0]):.3g} against the base's {float(sizes[0][0]):.3g}.",
            ),
            numbers={
                "matrices": len(found), "ruled_by_change": ruled, "lifted": lifted, "largest_ratio": _ratio(sizes)
            },
            tables=(_table(found),),
            curves=tuple(_curve(change, each) for change, each in found[: self.shown]),
        )

    def flops(self, pair: Pair) -> float:
        shapes = [sorted(change.shape) for change in pair.changes if change.linear]
        return sum(20.0 * small * small * large for small, large in shapes)

    @torch.no_grad()
    def _one(self, pair: Pair, change: Change) -> Sizes:
        weight = change.base()
        base = pair.spectra.of(weight)
        count = min(self.count, *weight.shape)
        after = leading(change.after(), count, base.right[:, : count + 4]).sizes
        if change.factors is not None:
            delta = of_factors(*change.factors).sizes[:count]
        else:
            delta = leading(Summed(change.delta()), count).sizes
        return base.sizes[:count], after, delta


def _ratio(sizes: Sizes) -> float:
    """The strongest direction of a change beside that of its base."""
    return float(sizes[2][0] / sizes[0][0].clamp_min(1e-30))


def _table(found: list[tuple[Change, Sizes]]) -> Table:
    rows: list[list[Value]] = [
        [change.name, *(float(each[0]) for each in sizes), _ratio(sizes)] for change, sizes in found[:10]
    ]
    heads = ("matrix", "base", "tuned", "change", "change / base")
    return Table(title="Largest singular values", heads=heads, rows=rows)


def _curve(change: Change, sizes: Sizes) -> Curves:
    names = ("base", "tuned", "change")
    lines = {name: [(float(place + 1), float(value)) for place, value in enumerate(each.tolist()) if value > 1e-12]
             for name, each in zip(names, sizes, strict=True)}  # fmt: skip
    return Curves(title=f"Singular values of {change.name}", across="place", up="singular value", lines=lines)
