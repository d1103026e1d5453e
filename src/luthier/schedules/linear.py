"""Linear decay after a linear warm-up.

Idea: the rate rises to its peak, then falls in a straight line to a floor at the last step.
Equation: f(t) = max(floor, (T - t) / (T - W)) after W = warmup x T steps.
Source: the recipe of LoRA's GPT-2 experiments (arXiv 2106.09685, appendix D.2).
Cost: none.
Use when: short runs of known length.
Not when: the run may be extended later; the decay would have come too early.
"""

from __future__ import annotations

from typing import final

from pydantic import Field

from luthier.schedules import Schedule, warmup_factor


@final
class Linear(Schedule):
    """A rate that falls in a straight line."""

    warmup: float = Field(0.03, ge=0, lt=1, description="share of all steps that warm up")
    floor: float = Field(0.0, ge=0, le=1, description="factor at the end, relative to the peak")

    def factor(self, step: int, total: int) -> float:
        warm = round(self.warmup * total)
        if step < warm:
            return warmup_factor(step, warm)
        return self.floor + (1 - self.floor) * (total - step) / max(1, total - warm)
