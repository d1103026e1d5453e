"""Learned: the number that a reward model gives an answer.

Idea: a model was trained on which of two answers people prefer, and says for one answer how good it is. Only
differences of its numbers mean something, so they are shifted (to a mean of 0 over demonstrations, say) and scaled, and
may be kept within bounds. An answer that was cut off has not ended as those that the model has learned from did, and
costs what `cut_off_cost` says.
Equation: r = clip((model(x, y) - shift) / scale, -most, most) - cut_off_cost [cut off]
Source: Ouyang et al., arXiv 2203.02155 (InstructGPT, sections 3.5 and C.2)
Cost: one forward pass over prompt and answer.
Use when: preferences were collected; in PPO or GRPO with a KL leash to the model that they were about.
Not when: it is optimised for long: the reward goes on rising while answers get worse. Watch a held-out check.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

from pydantic import Field

from luthier.core.errors import RecipeError
from luthier.data.conversation import Message
from luthier.data.sample import Sample
from luthier.rewards import Reward, RewardError, Score, Tools, Verdict


@final
class Learned(Reward):
    """What a reward model says of an answer."""

    shift: float = Field(0.0, description="what is taken off first, such as the mean over demonstrations")
    scale: float = Field(1.0, gt=0, description="what it is divided by then, such as the standard deviation there")
    most: float | None = Field(None, gt=0, description="values beyond this, either way, are cut to it; empty: none are")
    cut_off_cost: float = Field(0.0, ge=0, description="what an answer loses that was cut off at the limit of tokens")

    thoughts: bool = Field(False, description="whether the model sees what stands between <think> and </think> too")

    requires = frozenset({"reward-model"})

    @property
    def bounds(self) -> tuple[float, float]:
        most = math.inf if self.most is None else self.most
        return (-most - self.cut_off_cost, most)

    def score(self, samples: Sequence[Sample], tools: Tools) -> list[Verdict]:
        if tools.reward_model is None:
            raise RecipeError("the reward learned needs a reward model", allowed="a recipe with a reward_model")
        numbers = tools.reward_model.scores([self._conversation(sample) for sample in samples]) if samples else []
        return [self._one(sample, number) for sample, number in zip(samples, numbers, strict=True)]

    def _one(self, sample: Sample, number: float) -> Verdict:
        if not math.isfinite(number):
            return RewardError(f"the reward model gave {number}", allowed="a finite number").of(sample)
        most = math.inf if self.most is None else self.most
        value = min(max((number - self.shift) / self.scale, -most), most)
        cut = sample.ended == "length"
        reason = f"the reward model gave {number:.4g}" + ("; the answer was cut off" if cut else "")
        return Score(value - self.cut_off_cost * cut, {"raw": number, "cut_off": float(cut)}, reason)

    def _conversation(self, sample: Sample) -> tuple[Message, ...]:
        before = (Message("user", sample.prompt),) if isinstance(sample.prompt, str) else sample.prompt
        return (*before, Message("assistant", sample.answer if self.thoughts else sample.said))
