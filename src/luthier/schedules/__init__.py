"""Schedules: how the learning rate changes over a run.

The contract: a factor in [0, 1] for each step of a run whose length is known, a pure function of both, so that a
resumed run needs no state.
"""

from __future__ import annotations

from abc import abstractmethod

from luthier.core.knobs import Method


class Schedule(Method):
    """A learning-rate schedule."""

    @abstractmethod
    def factor(self, step: int, total: int) -> float:
        """What multiplies the peak learning rate at `step` (0-based) of `total` steps."""


def warmup_factor(step: int, warmup_steps: int) -> float:
    """Linear warm-up that reaches 1 at step `warmup_steps` and never stands at 0, so no step is wasted."""
    return min(1.0, (step + 1) / (warmup_steps + 1))
