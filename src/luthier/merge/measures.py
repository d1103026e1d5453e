"""What is told of a merge, tensor by tensor: how far apart the models are, and how far the result has moved.

Equation: cosine: the mean over pairs of models, of what they have changed where there is a base, of weights otherwise;
    change = |W - W_ref| / |W_ref| with the base, or the first model, as reference; conflict: the share of numbers that
    two models move in opposite directions.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
from jaxtyping import Float

from luthier.kernels.vectors import Moved, PlainVectors, Vectors, moved
from luthier.maths.spheres import cosine
from luthier.mergers import GRAM, Part, Rows, Sums
from luthier.model.editing.role_names import layer_of, tensor_roles


@final
@dataclass(frozen=True)
class Measured:
    """Sums over rows of one tensor."""

    moved: float
    whole: float
    conflicts: float
    products: Float[np.ndarray, "k k"] | None

    def __add__(self, other: Measured) -> Measured:
        products = None if self.products is None or other.products is None else self.products + other.products
        return Measured(self.moved + other.moved, self.whole + other.whole, self.conflicts + other.conflicts, products)


def measured(part: Part, merged: Rows, seen: Sequence[Sums]) -> Measured:
    """What these rows add to the measures of their tensor."""
    based = part.base is not None
    rows = (*part.models, part.origin) if based else part.models
    return of_rows(rows, moved(merged, rows, based=based), seen, PlainVectors(), based=based)


def of_rows(rows: Sequence[Rows], found: Moved, seen: Sequence[Sums], vectors: Vectors, *, based: bool) -> Measured:
    """The same with what has been found already; inner products only where no look has taken them."""
    wanted = len(rows) - based > 1 and not any(GRAM in sums for sums in seen)
    products = vectors.products(rows, based=based) if wanted else None
    return Measured(found.moved, found.whole, found.conflicts, products)


@final
@dataclass(frozen=True)
class TensorReport:
    """How one tensor was merged; `told` is what the method says of it."""

    name: str
    numbers: int
    change: float
    cosine: float | None
    conflict: float | None
    told: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, found: Measured, seen: Sequence[Sums], told: Mapping[str, Any], *, numbers: int,
           based: bool) -> TensorReport:  # fmt: skip
        """From the sums of all rows."""
        products = next((sums[GRAM] for sums in seen if GRAM in sums), found.products)
        cos = None
        if products is not None and len(products) > 1:
            pairs = [cosine(products, one, other) for one in range(len(products)) for other in range(one)]
            cos = math.fsum(pairs) / len(pairs)
        change = math.sqrt(found.moved / found.whole) if found.whole else float(found.moved > 0)
        conflict = found.conflicts / numbers if based and numbers and cos is not None else None
        return cls(name, numbers, change, cos, conflict, told)

    def as_dict(self) -> dict[str, Any]:
        """As plain values."""
        known = {"cosine": self.cosine, "sign_conflict": self.conflict}
        return {"name": self.name, "roles": list(tensor_roles(self.name)), "layer": layer_of(self.name),
                "change": self.change, **{key: value for key, value in known.items() if value is not None},
                **self.told}  # fmt: skip


def by_role(reports: Sequence[TensorReport]) -> list[dict[str, Any]]:
    """A line for each role: its tensors and the means of what is told of them, weighted by their numbers."""
    groups: dict[str, list[TensorReport]] = defaultdict(list)
    for report in reports:
        groups["+".join(tensor_roles(report.name))].append(report)
    lines = []
    for role, members in groups.items():
        line: dict[str, Any] = {"role": role, "tensors": len(members)}
        values = [(each, each.as_dict()) for each in members]
        for key in ("change", "cosine", "sign_conflict", "angle_degrees"):
            known = [(value[key], each.numbers) for each, value in values if key in value]
            if known:
                line[key] = sum(value * count for value, count in known) / max(sum(count for _, count in known), 1)
        if any("lerp" in each.told for each in members):
            line["lerp"] = sum(bool(each.told.get("lerp")) for each in members)
        lines.append(line)
    return lines
