"""What a rollout was: rewards and their parts, lengths, what could not be scored, and whether there was anything to
learn. Sums while it is made, plain numbers when it is told."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from luthier.data.rollouts import Answer, Group
from luthier.train.scoring import Scored, frequent

COUNTED: Final = (
    "groups", "alike", "redrawn", "redraws", "answers", "cut", "tokens", "failed", "unasked", "retried"
)  # fmt: skip
"""What is counted of a rollout: groups, those whose answers were all worth the same, those that were drawn again for
it, and in how many attempts; answers, those cut off, their tokens; those whose reward failed or does not apply, and how
often it was asked."""


@dataclass
class RolloutReport:
    """Counts and sums of one rollout by the policy `version`. `compared` says whether it learns from their worth."""

    version: int
    counts: Counter[str] = field(default_factory=Counter)
    surprise: float = 0.0
    compared: bool = True
    leash: float = 0.0
    seconds: float = 0.0
    sampling_seconds: float = 0.0
    failures: Counter[tuple[str, str]] = field(default_factory=Counter)
    _rewards: list[float] = field(default_factory=list)
    _parts: dict[str, list[float]] = field(default_factory=dict)
    _lengths: list[int] = field(default_factory=list)
    _alike: list[tuple[int, float]] = field(default_factory=list)

    def count(self, scored: Scored, answers: Sequence[Answer]) -> None:
        """Answers that were sampled and scored, those that could not be scored among them."""
        self.counts.update({name: count for name, count in scored.counts.items() if name != "samples"})
        self.failures.update((failure.received, failure.do) for failure in scored.failures)
        for answer in answers:
            self.counts.update(answers=1, cut=int(answer.ended == "length"), tokens=answer.length)
            self.surprise -= float(answer.sampled[answer.own].sum())

    def group(self, groups: Sequence[Group], *, longest: int) -> None:
        """The groups that came of them."""
        for group in groups:
            self.counts["groups"] += 1
            for answer in group.answers:
                self._rewards.append(answer.reward)
                self._lengths.append(min(answer.length, longest))
                for name, value in answer.parts.items():
                    self._parts.setdefault(name, []).append(value)
            if self.compared and group.answers and group.alike:
                self.counts["alike"] += 1
                self._alike.append((group.row, group.answers[0].reward))

    def sampled_in(self, seconds: float) -> None:
        """How long sampling and scoring took."""
        self.sampling_seconds = seconds

    @property
    def _reasons(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for (reason, _), count in self.failures.items():
            found[reason] += count
        return found

    def why(self) -> str:
        """What became of the answers, in a sentence."""
        said = "; ".join(f"{count} x {reason}" for reason, count in self._reasons.most_common(3))
        reasons = f" ({said})" if said else ""
        return (
            f"of {self.counts['answers']} answers {self.counts['failed']} could not be scored{reasons}, "
            f"{self.counts['unasked']} had no reward and {self.counts['cut']} were cut off"
        )

    def advice(self) -> str:
        """What to do where hardly any answer could be trained."""
        left = self.counts["answers"]
        if self.counts["failed"] == left:
            own = "".join(f"{do}, or " for (_, do), _ in self.failures.most_common(1) if do)
            return f"{own}mend the reward, and try it with luthier reward RECIPE FILE on answers that are there"
        if self.counts["failed"] + self.counts["unasked"] == left:
            return "give a number for more of them: where the reward gives None an answer is left out"
        return "look at the rewards' errors and at rollouts.max_new_tokens; raise rollouts.prompts"

    def values(self) -> dict[str, Any]:
        """Plain numbers. Means are over answers that have a score."""
        best = max(self._rewards, default=math.nan)
        tokens = self.counts["tokens"]
        return {
            **{name: self.counts[name] for name in COUNTED},
            "failures": frequent(self._reasons),
            "version": self.version,
            "reward": _mean(self._rewards),
            "reward_std": _std(self._rewards),
            "reward_most": best,
            "parts": {name: _mean(values) for name, values in self._parts.items()},
            "always_best": [row for row, reward in self._alike if reward == best],
            "never": [row for row, reward in self._alike if reward < best],
            "length": _mean([float(each) for each in self._lengths]),
            "entropy": self.surprise / tokens if tokens else math.nan,
            "leash": self.leash,
            "sampling_seconds": self.sampling_seconds,
            "seconds": self.seconds,
        }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _std(values: Sequence[float]) -> float:
    mean = _mean(values)
    return math.sqrt(_mean([(value - mean) ** 2 for value in values])) if values else math.nan
