"""How long the rows are and how much of them is trained, as plain data and as bars for a terminal.

Use it to see what a limit on tokens would cost and how much of each step is answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import numpy as np
from numpy.typing import NDArray

from luthier.core.units import percent_text

Bins = Literal["width", "power"]

QUANTILES: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
_EIGHTHS = " ▏▎▍▌▋▊▉"


@final
@dataclass(frozen=True, slots=True)
class LengthHistogram:
    """Counts of lengths in bins: bin i holds edges[i] <= length < edges[i + 1].

    `quantiles` holds the length at each of QUANTILES; `trained_share` the part of all tokens that carries loss.
    """

    edges: tuple[int, ...]
    counts: tuple[int, ...]
    quantiles: tuple[int, ...]
    token_count: int
    trained_share: float

    @classmethod
    def of(
        cls,
        lengths: Sequence[int] | NDArray[np.integer],
        *,
        trained_count: int = 0,
        bins: Bins = "power",
        bin_count: int = 10,
    ) -> LengthHistogram:
        """The histogram of `lengths`: bins that double, or at most `bin_count` bins of equal width."""
        values = np.asarray(lengths, dtype=np.int64)
        if not len(values):
            return cls((), (), (), 0, 0.0)
        edges = _powers(values) if bins == "power" else _widths(values, max(bin_count, 1))
        places = np.searchsorted(edges, values, side="right") - 1
        counts = np.bincount(places, minlength=len(edges) - 1)
        total = int(values.sum())
        return cls(
            edges=tuple(edges),
            counts=tuple(int(count) for count in counts),
            # A length that a row really has, never one between two.
            quantiles=tuple(int(value) for value in np.quantile(values, QUANTILES, method="higher")),
            token_count=total,
            trained_share=trained_count / total if total else 0.0,
        )

    @property
    def row_count(self) -> int:
        return sum(self.counts)

    def as_dict(self) -> dict[str, object]:
        """The histogram as plain values."""
        return {
            "edges": list(self.edges),
            "counts": list(self.counts),
            "quantiles": {str(part): value for part, value in zip(QUANTILES, self.quantiles, strict=False)},
            "token_count": self.token_count,
            "trained_share": self.trained_share,
        }

    def draw(self, width: int = 60) -> str:
        """One line for each bin, at most `width` characters wide where that is possible, and a summary."""
        if not self.counts:
            return "no rows"
        labels = [f"{low}-{high - 1}" for low, high in zip(self.edges, self.edges[1:], strict=False)]
        label_width = max(map(len, labels))
        count_width = len(str(max(self.counts)))
        room = max(width - label_width - count_width - 4, 1)
        lines = [
            f"{label:>{label_width}}  {count:>{count_width}}  {_bar(count / max(self.counts), room)}".rstrip()
            for label, count in zip(labels, self.counts, strict=True)
        ]
        middle = self.quantiles[QUANTILES.index(0.5)]
        summary = f"{self.row_count} rows, {self.token_count} tokens, median {middle}, longest {self.quantiles[-1]}"
        return "\n".join([*lines, f"{summary}, {percent_text(self.trained_share)} trained"])


def _powers(values: NDArray[np.int64]) -> list[int]:
    low = 1 << max(int(values.min()).bit_length() - 1, 0) if values.min() > 0 else 0
    edges = [low]
    while edges[-1] <= values.max():
        edges.append(max(edges[-1] * 2, 1))
    return edges


def _widths(values: NDArray[np.int64], count: int) -> list[int]:
    low, high = int(values.min()), int(values.max())
    width = -(-(high - low + 1) // count)
    return list(range(low, high + width + 1, width))


def _bar(share: float, room: int) -> str:
    eighths = round(share * room * 8)
    if share > 0:
        eighths = max(eighths, 1)
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).rstrip()
