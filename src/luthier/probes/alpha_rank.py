"""Alpha and rank: what another alpha, another rank or rsLoRA would have done to the size of the update.

Idea: rank and alpha are not two knobs but one and a half: at a fixed alpha every doubling of the rank halves what a
LoRA update is multiplied by. How large the update then becomes is known in three cases, and a choice is told by its
size beside that of the run in each: a number near 1 trains like the run did, one far below hardly trains, one far above
needs a lower learning rate.
Equation: random B: gamma sqrt(r); first SGD step: gamma^2 r; first Adam step: gamma r; gamma = alpha / r, or
    alpha / sqrt(r) with rsLoRA.
Source: Kalajdzievski, arXiv 2312.03732, theorem 3.2; alpha = 2r: Shuttleworth et al., arXiv 2410.21228, section 6.
Cost: none: closed forms.
Use when: a rank is to be changed and the learning rate is not.
Not when: training is long: after many steps the size depends on the data, and drift measures it.
"""

from __future__ import annotations

from typing import ClassVar, final

from pydantic import Field

from luthier.maths.adapter_scale import CASES, alpha_of_same_scale, growth, scale
from luthier.model.comparing.pair import Pair
from luthier.probes import Concern, Curves, Probe, Report, Table

RANKS = tuple(2**power for power in range(10))
MEANING = {"random": "random B", "sgd": "first SGD step", "adam": "first Adam step"}
Choice = tuple[str, int, float, bool]
"""What it is called, rank, alpha, and whether it is rsLoRA."""


@final
class AlphaRank(Probe):
    """Other choices of rank and alpha beside that of the run."""

    needs: ClassVar[frozenset[str]] = frozenset({"settings"})
    concern: ClassVar[Concern] = "knobs"

    times: int = Field(4, ge=2, description="how many times the rank the higher choices have")

    def look(self, pair: Pair) -> Report:
        known = pair.settings
        rank, alpha, rslora = known.get("rank"), known.get("alpha"), bool(known.get("rslora"))
        if not isinstance(rank, int) or not isinstance(alpha, (int, float)):
            sentence = "The adapter has no rank and alpha: there is no scale that could be another."
            return Report(verdict=(sentence,), measured=False)
        own = scale(rank, float(alpha), rslora=rslora)
        choices = _choices(rank, float(alpha), rslora, self.times)
        rows = [[name, one, each, "yes" if rs else "no", scale(one, each, rslora=rs) / own,
                 *(growth(case, one, scale(one, each, rslora=rs)) / growth(case, rank, own) for case in CASES)]
                for name, one, each, rs in choices]  # fmt: skip
        heads = ("choice", "rank", "alpha", "rsLoRA", "scale", *(MEANING[case] for case in CASES))
        return Report(
            verdict=_verdict(rank, float(alpha), rslora, self.times),
            numbers={"rank": rank, "alpha": float(alpha), "rslora": int(rslora), "scale": own},
            tables=(Table(title="Size of the update beside this run's", heads=heads, rows=rows),),
            curves=tuple(_curve(case, rank, float(alpha), rslora) for case in CASES),
        )


def _choices(rank: int, alpha: float, rslora: bool, times: int) -> list[Choice]:
    """What might be chosen instead; what comes to the same as something above is left out."""
    more = times * rank
    every: list[Choice] = [
        ("this run", rank, alpha, rslora),
        ("alpha = 2 r", rank, 2.0 * rank, False),
        (f"{times} times the rank, same alpha", more, alpha, rslora),
        (f"{times} times the rank, alpha = 2 r", more, 2.0 * more, False),
        ("rsLoRA, same alpha", rank, alpha, True),
        ("rsLoRA, same scale", rank, alpha if rslora else alpha_of_same_scale(rank, alpha), True),
        (f"rsLoRA, {times} times the rank, same scale as here", more,
         alpha if rslora else alpha_of_same_scale(rank, alpha), True),
    ]  # fmt: skip
    kept: list[Choice] = []
    for choice in every:
        if choice[1:] not in [other[1:] for other in kept]:
            kept.append(choice)
    return kept


def _verdict(rank: int, alpha: float, rslora: bool, times: int) -> tuple[str, ...]:
    own = scale(rank, alpha, rslora=rslora)
    more = times * rank
    higher = scale(more, alpha, rslora=rslora)
    sgd, adam = (growth(case, more, higher) / growth(case, rank, own) for case in ("sgd", "adam"))
    name = "rsLoRA" if rslora else "LoRA"
    said = [
        f"{name} of rank {rank} with alpha {alpha:g} multiplies its update by {own:.4g}.",
        f"With {times} times the rank and the same alpha, a first SGD step moves {sgd:.3g} times as far and a first "
        f"Adam step {adam:.3g} times.",
    ]
    if not rslora and alpha != 2.0 * rank:
        said.append(f"alpha = 2 r, which is {2 * rank} here, would multiply by 2 instead of {own:.3g}.")
    if not rslora:
        same = alpha_of_same_scale(rank, alpha)
        said.append(
            f"rsLoRA with this alpha would multiply by {scale(rank, alpha, rslora=True):.3g}; with alpha {same:.4g} it "
            "is this very run, and keeps the size of a first SGD step as the rank grows."
        )
    return tuple(said)


def _curve(case: str, rank: int, alpha: float, rslora: bool) -> Curves:
    """How the size of an update grows with the rank, beside its size at the rank of the run."""
    same = alpha if rslora else alpha_of_same_scale(rank, alpha)
    fixed = alpha * rank**0.5 if rslora else alpha
    whole = growth(case, rank, scale(rank, alpha, rslora=rslora))

    def line(choose: float | None, rs: bool) -> list[tuple[float, float]]:
        return [(float(one), growth(case, one, scale(one, 2.0 * one if choose is None else choose, rslora=rs)) / whole)
                for one in RANKS]  # fmt: skip

    lines = {"LoRA, alpha fixed": line(fixed, False), "rsLoRA, alpha fixed": line(same, True),
             "alpha = 2 r": line(None, False)}  # fmt: skip
    return Curves(title=f"Size of the update: {MEANING[case]}", across="rank", up="times this run's", lines=lines,
                  logarithmic=True)  # fmt: skip
