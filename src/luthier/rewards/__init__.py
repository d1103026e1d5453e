"""Rewards: how good an answer is, in numbers that reinforcement learning can use.

The contract: a reward sees samples and says of each how good it is (a `Score`), that it does not apply (None), or that
it could not be found out (a `RewardError` in the place of the score). What could not be found out is never a 0: whoever
asked tries again, then leaves the sample out and counts it (`train/scoring.py`). A sample is judged by itself: what
stands beside it changes nothing. `requires` is which `Tools` it needs, of "judge", "reward-model" and "sandbox".
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from luthier.core.errors import LuthierError
from luthier.core.knobs import Method
from luthier.data.conversation import Message
from luthier.data.sample import Sample
from luthier.model.scorer import TextModel, TextScorer

if TYPE_CHECKING:
    from luthier.sandbox.sandbox import Sandbox

Numbers = Mapping[str, float]


@dataclass(frozen=True)
class Score:
    """How good an answer is: the number, what it is made of by name, why, and what the one who answered may be told."""

    value: float
    parts: Numbers = field(default_factory=dict)
    reason: str = ""
    feedback: str = ""

    @property
    def finite(self) -> bool:
        """Whether all of its numbers are."""
        return all(map(math.isfinite, (self.value, *self.parts.values())))


class RewardError(LuthierError, RuntimeError):
    """A reward that could not be computed; `sample` is what it was asked about, `again` whether to try once more."""

    code = "reward"
    advice = "look at the sample that the error carries; without it the others are scored as before"

    sample: Sample | None = None
    again: bool = True

    def of(self, sample: Sample, *, again: bool = True) -> RewardError:
        """The error, with the sample in it."""
        self.sample, self.again = sample, again
        return self


Verdict = Score | RewardError | None


@dataclass(frozen=True, kw_only=True)
class Tools:
    """What rewards may use; `step` of `steps` is how far training is, `seed` what hidden inputs are drawn with.

    `sandbox` opens one for the limits (and modules) it is given, and keeps it open for the next who ask.
    """

    judge: TextModel | None = None
    reward_model: TextScorer | None = None
    sandbox: Callable[..., Sandbox] | None = None
    step: int = 0
    steps: int = 0
    seed: int = 0


class Reward(Method):
    """A way to tell how good answers are."""

    @property
    def bounds(self) -> tuple[float, float]:
        """Values lie within these."""
        return (0.0, 1.0)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the data row that it reads, which each row must have."""
        return ()

    @property
    def needs(self) -> frozenset[str]:
        """The tools that it cannot do without."""
        return self.requires

    def check(self, facts: Mapping[str, Any]) -> None:
        """Raise DataError for a data row that has all `columns` and a cell that it cannot read. Nothing is run."""

    @abstractmethod
    def score(self, samples: Sequence[Sample], tools: Tools) -> list[Verdict]:
        """A verdict on each sample, in order. Raises DataError for a row that it cannot be asked about."""


@dataclass(frozen=True)
class Turn:
    """What an environment answers: messages to add, whether that was all, and a score.

    At the end a score of None leaves the last answer to the reward itself, with all that was said before as its prompt.
    """

    messages: tuple[Message, ...] = ()
    done: bool = False
    score: Verdict = None


class Episode(Protocol):
    """One run through an environment. It begins with `messages`; `tools` (JSON schemas) are on offer in it."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...]

    def step(self, answer: Message) -> Turn:
        """The answer to what the model said."""


@runtime_checkable
class Environment(Protocol):
    """What a reward file has besides, a `reset` that opens an episode, when answers are part of a longer exchange."""

    def reset(self, prompt: tuple[Message, ...], facts: Mapping[str, Any], *, seed: int) -> Episode:
        """A new episode for a data row; the same seed begins the same one."""
