"""Length: DAPO's soft punishment of answers that get too long.

Idea: an answer that is cut off at the limit is a loss whatever it says, and one just short of the limit was nearly cut
off. So the last `buffer_tokens` before the limit cost linearly up to 1, and more than the limit costs 1.
Equation: 0 if n <= L - B; (L - B - n) / B if n <= L; -1 beyond, with n tokens, the limit L and the buffer B
Source: Yu et al., arXiv 2503.14476 (DAPO, equation 13; L = 20,480 and B = 4,096)
Cost: no model; the number of tokens is known.
Use when: added to what an answer is worth, and answers grow towards the limit; keep L at or below what is sampled.
Not when: short answers are what is wanted for their own sake: nothing is won below L - B.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from pydantic import Field, model_validator

from luthier.core.errors import RecipeError
from luthier.data.sample import Sample
from luthier.rewards import Reward, RewardError, Score, Tools, Verdict


@final
class Length(Reward):
    """What an answer of so many tokens costs."""

    most_tokens: int = Field(20_480, ge=1, description="the limit: more tokens cost 1")
    buffer_tokens: int = Field(4_096, ge=1, description="how many tokens before the limit the cost begins")

    @model_validator(mode="after")
    def _buffer_within(self) -> Length:
        if self.buffer_tokens > self.most_tokens:
            raise RecipeError(f"buffer_tokens is {self.buffer_tokens}", allowed=f"at most {self.most_tokens}")
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        return (-1.0, 0.0)

    def score(self, samples: Sequence[Sample], tools: Tools) -> list[Verdict]:
        return [self._one(sample) for sample in samples]

    def _one(self, sample: Sample) -> Verdict:
        count = len(sample.tokens)
        if sample.answer and not count:
            told = f"an answer of {len(sample.answer)} characters came without its tokens"
            return RewardError(told, allowed="the tokens that were sampled").of(sample, again=False)
        over = count - (self.most_tokens - self.buffer_tokens)
        value = -min(max(over, 0) / self.buffer_tokens, 1.0) + 0.0  # never -0.0
        told = f"{count:,} tokens, {over:,} more than go free" if over > 0 else ""
        return Score(value, {"tokens": float(count)}, told, told)
