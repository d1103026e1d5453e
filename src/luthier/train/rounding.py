"""A watch over weights in a lower precision: how many of their updates vanish when the master is rounded.

Idea: the optimizer moves a float32 master; the model computes with its rounded copy. An update below half a unit in the
last place of the copy changes nothing the model computes with. One step of that is harmless, because the master keeps
it; nearly all updates in nearly all steps is a learning rate too small for the precision.
Cost: a copy of at most `SAMPLES` elements of each tensor, so that the masters need not be kept twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, final

import torch
from torch import Tensor

SAMPLES: Final = 4096
"""Elements of each tensor that are looked at: the share is then known to about 0.01 for each of them."""


@final
class RoundingWatch:
    """Looks at the same elements of each master before and after a step. `lower` holds the rounded copies."""

    def __init__(self, masters: Mapping[str, Tensor], lower: Mapping[str, Tensor]) -> None:
        self.pairs = [(masters[name], lower[name].dtype) for name in lower]

    def look(self) -> list[Tensor]:
        """The sampled elements of each master as they are now."""
        return [_sampled(master).clone() for master, _ in self.pairs]

    def rounded_away(self, before: list[Tensor]) -> float | None:
        """The share of moved elements whose rounded copy stayed the same; None when no element moved."""
        moved = same = 0.0
        for (master, dtype), old in zip(self.pairs, before, strict=True):
            new = _sampled(master)
            moves = new != old
            stays = moves & (new.to(dtype) == old.to(dtype))
            counts = torch.stack([moves.sum(), stays.sum()]).tolist()
            # Each tensor counts by its size, however few of its elements were looked at.
            each = master.numel() / len(old)
            moved += each * counts[0]
            same += each * counts[1]
        return same / moved if moved else None


def _sampled(master: Tensor) -> Tensor:
    # An odd stride walks through all columns of a matrix; an even one could meet the same few again and again.
    return master.detach().reshape(-1)[:: (master.numel() // SAMPLES) | 1]
