"""Cosine decay after a linear warm-up.

Idea: the rate rises to its peak, then follows half a cosine down to a floor: slow at first, fast in the middle.
Equation: f(t) = floor + (1 - floor) (1 + cos(pi (t - W) / (T - W))) / 2 after W = warmup x T steps.
Source: Loshchilov and Hutter, arXiv 1608.03983, equation 5, without restarts.
Cost: none.
Use when: in doubt.
Not when: the length of the run is not known in advance.
"""

from __future__ import annotations

import math
from typing import final

from pydantic import Field

from luthier.schedules import Schedule, warmup_factor


@final
class Cosine(Schedule):
    """A rate that follows half a cosine."""

    warmup: float = Field(0.03, ge=0, lt=1, description="share of all steps that warm up")
    floor: float = Field(0.0, ge=0, le=1, description="factor at the end, relative to the peak")

    def factor(self, step: int, total: int) -> float:
        warm = round(self.warmup * total)
        if step < warm:
            return warmup_factor(step, warm)
        progress = (step - warm) / max(1, total - warm)
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * progress)) / 2
