"""Constant learning rate, with a linear warm-up if one is asked for.

Idea: the rate stays at its peak.
Equation: f(t) = min(1, (t+1) / (W+1)) with W = warmup x T.
Source: the plainest schedule; prompt tuning (arXiv 2104.08691) uses it.
Cost: none.
Use when: the length of the run is not known in advance, or parts of runs are compared.
Not when: the last bit of loss matters; a decay at the end wins.
"""

from __future__ import annotations

from typing import final

from pydantic import Field

from luthier.schedules import Schedule, warmup_factor


@final
class Constant(Schedule):
    """A constant rate after warm-up."""

    warmup: float = Field(0.0, ge=0, lt=1, description="share of all steps that warm up")

    def factor(self, step: int, total: int) -> float:
        return warmup_factor(step, round(self.warmup * total))
