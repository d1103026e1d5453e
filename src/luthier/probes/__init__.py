"""Probes: what tuning did to a model, as data.

The contract: a probe sees a pair, the model before and after, and makes a report: sentences, numbers, tables and series
to draw. It changes neither model, writes nothing and draws nothing; pages are made of reports elsewhere. What it needs
(`weights`, `texts`, `samples`, `gradients`, `settings`) it says, and a pair that lacks it gets a report that says so,
not a number.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, final

from luthier.core.errors import NumericError
from luthier.core.events import plain
from luthier.core.knobs import Method
from luthier.model.comparing.pair import Pair

Value = float | int | str | None
Concern = Literal["harm", "change", "knobs"]
"""What may be lost, what is different, what to set next time: in the order in which people ask."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of values under heads; the first column names the row."""

    title: str
    heads: tuple[str, ...]
    rows: Sequence[Sequence[Value]]


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Lines over a common axis: for each name its points."""

    title: str
    across: str
    up: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    logarithmic: bool = False


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Values by row and column, to be coloured; None where there is none. `signed` ones have a middle at zero."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    signed: bool = False


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a probe found. A report that is not `measured` has only a verdict: why there is nothing to say."""

    verdict: tuple[str, ...]
    numbers: Mapping[str, Value] = field(default_factory=dict)
    tables: tuple[Table, ...] = ()
    curves: tuple[Curves, ...] = ()
    grids: tuple[Grid, ...] = ()
    measured: bool = True

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        found: dict[str, Any] = plain(asdict(self))
        return found


class Probe(Method):
    """A way to look at what tuning did."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """What of a pair it looks at: weights, texts, samples, gradients, settings."""
    concern: ClassVar[Concern] = "change"
    """Which question it answers, and so its place among the others."""
    by_name_only: ClassVar[bool] = False
    """Whether it is left out unless it is asked for, however little it costs here."""

    @final
    def of(self, pair: Pair) -> Report:
        """The report about a pair. Raises NumericError where weights are not finite."""
        if "weights" in self.needs and not pair.changes:
            what = pair.settings.get("method") or ", ".join(pair.beside)
            why = f": {what} works beside them" if what else ""
            sentence = f"No matrix of the base is changed{why}, and there is nothing to look at."
            return Report(verdict=(sentence,), measured=False)
        if "weights" in self.needs and not sum(require_finite(each.name, each.norm()) for each in pair.changes):
            sentence = "No weight differs from the base: there is no change to look at."
            return Report(verdict=(sentence,), numbers={"changed_matrices": 0})
        lacking = [name for name in ("texts", "samples") if name in self.needs and not getattr(pair, name)]
        if lacking:
            sentence = "No text is known to ask the two models about: name some with --keep FILE."
            return Report(verdict=(sentence,), measured=False)
        if "gradients" in self.needs and pair.gradients is None:
            sentence = (
                "No rows with a loss are known to take gradients of: a fine-tune on two rows or more has some, a run "
                "that was taught by rewards and two folders have none."
            )
            return Report(verdict=(sentence,), measured=False)
        return self.look(pair)

    @abstractmethod
    def look(self, pair: Pair) -> Report:
        """The report about a pair that has what the probe needs."""

    def flops(self, pair: Pair) -> float:
        """About how much work it is; what is much is only done when it is asked for by name."""
        return 0.0


def require_finite(name: str, number: float) -> float:
    """The number. Raises NumericError where it is none: a report shows no measure of broken weights."""
    if not abs(number) < float("inf"):
        raise NumericError(
            f"{name} is {number}: the weights hold NaN or infinity",
            do="look at the run's events; train again from the last good checkpoint",
        )
    return number
