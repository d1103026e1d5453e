"""Forgetting: the loss on texts that were not trained on, before and after.

Idea: what tuning took away shows in the loss on text of the kind the base grew on, and on other tasks it could do. It
is read beside what tuning gained: a loss that rose by a tenth of what the task's own fell is a price, one that rose by
as much is a bad trade. Where something was forgotten, a share of such text among the training rows (replay) is the
remedy with the most evidence behind it, then a lower learning rate and fewer steps.
Equation: forgetting = L_after(text) - L_before(text), L the mean negative log-probability of a token; price =
    forgetting / (L_before(task) - L_after(task)).
Source: Luo et al., arXiv 2308.08747; replay: Scialom et al., arXiv 2205.12393, section 3; Ibrahim et al., arXiv
    2403.08763.
Cost: two forward passes over each text.
Use when: always before a tuned model replaces its base.
Not when: the texts were trained on: what they say of forgetting is then wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, final

from pydantic import Field

from luthier.model.comparing.pair import Pair, Text
from luthier.probes import Concern, Probe, Report, Table, Value, require_finite

KEPT: Final = ("kept", "other")
"""Kinds of text that a tuned model should not have become worse at."""


@final
class Forgetting(Probe):
    """Losses before and after on the task and on what should have been kept."""

    needs: ClassVar[frozenset[str]] = frozenset({"texts"})
    concern: ClassVar[Concern] = "harm"

    tolerance: float = Field(0.02, ge=0, description="nats by which a loss may rise without being called forgetting")

    def look(self, pair: Pair) -> Report:
        found = []
        for done, text in enumerate(pair.texts):
            pair.tell("forgetting", done, len(pair.texts))
            with pair.before() as model:
                before = text.loss(model)
            with pair.after() as model:
                after = text.loss(model)
            found.append(Losses(text, require_finite(text.name, before), require_finite(text.name, after)))
        numbers: dict[str, Value] = {}
        for one in found:
            numbers |= {f"{one.text.name}_before": one.before, f"{one.text.name}_after": one.after}
        kept = [one for one in found if one.text.kind in KEPT]
        gained = sum(max(0.0, -one.rise) for one in found if one.text.kind == "task")
        if kept:
            worst = max(one.rise for one in kept)
            numbers["forgetting"] = worst
            numbers["price"] = worst / gained if gained > 0 else None
        return Report(
            verdict=self._verdict(found, kept, gained),
            numbers=numbers,
            tables=(_table(found),),
        )

    def _verdict(self, found: Sequence[Losses], kept: Sequence[Losses], gained: float) -> tuple[str, ...]:
        said = [
            f"The loss on {one.text.name} {'fell' if one.rise < 0 else 'rose'} from {one.before:.4f} to "
            f"{one.after:.4f}." if f"{one.before:.4f}" != f"{one.after:.4f}"
            else f"The loss on {one.text.name} stayed at {one.before:.4f}."
            for one in found
        ]  # fmt: skip
        if not kept:
            return (*said, "No text that should have been kept was given, so nothing is known of forgetting: "
                           "--keep FILE names some.")  # fmt: skip
        worst = max(kept, key=lambda one: one.rise)
        if worst.rise <= self.tolerance:
            return (*said, f"Nothing was forgotten that these texts could tell (at most {worst.rise:+.4f} nats).")
        growth = math.expm1(worst.rise)
        price = f", {worst.rise / gained:.2g} of what the task gained" if gained > 0 else ""
        return (*said, f"Some of {worst.text.name} was forgotten: {worst.rise:+.4f} nats, a perplexity "
                       f"{100 * growth:.0f} % higher{price}.", _advice(worst.rise, gained))  # fmt: skip


@final
@dataclass(frozen=True)
class Losses:
    """A text and its loss before and after."""

    text: Text
    before: float
    after: float

    @property
    def rise(self) -> float:
        return self.after - self.before


def _advice(rise: float, gained: float) -> str:
    """What to do about it, the mildest remedy that may be enough."""
    replay = "mix rows of such text into data.train (data.train takes a list; FILE#500 takes 500 rows of one)"
    if rise < 0.1 and rise < gained / 4:
        return f"A small price. To lower it, {replay}: a twentieth of the tokens is a start."
    return f"To lower it, {replay}, a tenth of the tokens or more; halve the learning rate; or train fewer epochs."


def _table(found: Sequence[Losses]) -> Table:
    rows: list[Sequence[Value]] = [
        [one.text.name, one.text.kind, one.before, one.after, one.rise, math.exp(min(one.rise, 700.0))] for one in found
    ]
    heads = ("text", "kind", "loss before", "loss after", "rise, nats", "perplexity, times")
    return Table(title="Losses before and after", heads=heads, rows=rows)
