"""One rollout: prompts -> sampled answers -> rewards -> groups, as a function of where it starts and who speaks.

Idea: all random numbers are functions of (seed, rollout, attempt, prompt, answer), and what a rollout starts from is
kept in a few numbers. So one that was lost on its way is made again as it was, by the same weights. It has two halves:
what is said, which an engine somewhere else may do while something else is done here, and what that is worth.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, final

import numpy as np

from luthier.core.errors import RecipeError
from luthier.data.forest import Ints
from luthier.data.rollout_learner import RolloutLearner
from luthier.data.rollouts import Answer, Group, Prompt
from luthier.data.sample import Sample
from luthier.model.speaker import PolicySampling, Sampling, Speaker, Spoken
from luthier.rewards import Verdict
from luthier.train.episodes import Episodes, settled
from luthier.train.rollout_report import RolloutReport
from luthier.train.scoring import Scored
from luthier.train.source import Cursor

Scorer = Callable[[Sequence[Sample]], Scored]
Decode = Callable[[Ints], str]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a rollout is made: so many `prompts`, each answered `answers` times, in at most `max_new_tokens` tokens.

    An answer that was cut off is kept as it is, or left untrained (`mask`), though its group still knows its worth.
    With `redraws`, groups whose answers were all worth the same are replaced by those of other prompts, in at most so
    many attempts. With a `lag` of 1 each rollout is sampled before the steps of the one before it, and a token counts
    for `correction` at most. Where a speaker is elsewhere, what it said is `scored_beside` the steps too.
    """

    prompts: int
    answers: int
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    cut: Literal["keep", "mask"] = "keep"
    redraws: int = 0
    lag: int = 0
    correction: float = 2.0
    scored_beside: bool = True

    def sampling(self, temperature: float, seed: int) -> Sampling:
        """How answers are drawn: from the very policy that is trained, so nothing is cut off or steered."""
        return PolicySampling(
            max_new_tokens=self.max_new_tokens, temperature=temperature, seed=seed, stop_ids=self.stop_ids
        )


@dataclass(frozen=True)
class Start:
    """Where a rollout starts: at which prompt, the how-many-th it is, and how many steps its policy was trained."""

    cursor: Cursor
    number: int
    version: int


@dataclass(frozen=True)
class Said:
    """What was said to some prompts, and where the next ones begin. Of exchanges verdicts are there too."""

    asked: list[Prompt]
    answers: list[Answer]
    verdicts: list[Sample | Verdict]
    cursor: Cursor
    seconds: float
    retried: int = 0


@dataclass(frozen=True)
class Rolled:
    """A rollout: its groups, what it was, and where the next one begins."""

    groups: list[Group]
    report: RolloutReport
    cursor: Cursor


@final
@dataclass(kw_only=True)
class Roller:
    """Makes rollouts of `prompts`. `least` is how many groups there have to be to learn from."""

    prompts: Sequence[Prompt]
    objective: RolloutLearner
    score: Scorer
    decode: Decode
    plan: Plan
    seed: int
    episodes: Episodes | None = None

    def roll(self, start: Start, speaker: Speaker) -> Rolled:
        """The whole of it."""
        return self.finish(start, self.say(start, speaker), speaker)

    def sampling(self, start: Start, attempt: int = 0) -> Sampling:
        """How answers are drawn."""
        return self.plan.sampling(self.objective.temperature, seed_of(self.seed, start.number, attempt))

    def say(self, start: Start, speaker: Speaker) -> Said:
        """The answers to all prompts, before anybody has looked whether they teach anything."""
        return self._said(start, speaker, start.cursor, self.plan.prompts, 0)

    def finish(self, start: Start, said: Said, speaker: Speaker) -> Rolled:
        """What they are worth, and others in the place of those that teach nothing."""
        began, spent = time.perf_counter(), said.seconds
        report = RolloutReport(version=start.version, compared=self.objective.rewarded)
        kept: list[Group] = []
        for attempt in range(self.plan.redraws + 1):
            if attempt:
                report.counts["redraws"] += 1
                said = self._said(start, speaker, said.cursor, self.plan.prompts - len(kept), attempt)
            groups = self._groups(said, start.version, report)
            last = attempt == self.plan.redraws
            kept += groups if last else [group for group in groups if not group.alike]
            report.counts["redrawn"] += 0 if last else sum(group.alike for group in groups)
            if len(kept) >= self.plan.prompts:
                break
        kept = [group for group in kept if group.trained]
        if len(kept) < self.objective.minibatches:
            raise RecipeError(
                f"rollout {start.number} has {len(kept)} groups with an answer to train, for "
                f"{self.objective.minibatches} steps: {report.why()}",
                do=report.advice(),
            )
        report.seconds = spent + time.perf_counter() - began
        report.sampled_in(report.seconds)
        return Rolled(kept, report, said.cursor)

    def _said(self, start: Start, speaker: Speaker, cursor: Cursor, count: int, attempt: int) -> Said:
        began = time.perf_counter()
        prompts, cursor = self._take(cursor, count)
        sampling = self.sampling(start, attempt)
        asked = [prompt for prompt in prompts for _ in range(self.plan.answers)]
        retried = 0
        if self.episodes is None:
            answers = [self._answer(each) for each in speaker.speak([prompt.tokens for prompt in asked], sampling)]
            verdicts: list[Sample | Verdict] = [
                sample_of(prompt, answer) for prompt, answer in zip(asked, answers, strict=True)
            ]
        else:
            asked, answers, verdicts, retried = self._played(self.episodes, asked, speaker, sampling)
        return Said(asked, answers, verdicts, cursor, time.perf_counter() - began, retried)

    def _take(self, cursor: Cursor, count: int) -> tuple[list[Prompt], Cursor]:
        """The next prompts, in an order that is a pure function of (seed, epoch)."""
        taken: list[Prompt] = []
        epoch, used = cursor.epoch, cursor.used
        while len(taken) < count:
            if used >= len(self.prompts):
                epoch, used = epoch + 1, 0
            order = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.prompts))
            own = order[used : used + count - len(taken)]
            taken += [self.prompts[int(index)] for index in own]
            used += len(own)
        return taken, Cursor(epoch, used)

    def _groups(self, said: Said, version: int, report: RolloutReport) -> list[Group]:
        """The answers to some prompts, scored."""
        scored = settled(said.verdicts, self.score, retried=said.retried)
        report.count(scored, said.answers)
        groups = []
        for first in range(0, len(said.asked), self.plan.answers):
            own = range(first, first + self.plan.answers)
            # An exchange that never began does not know what the others of its group began with.
            begun = (said.asked[place] for place in own if scored.scores[place] is not None)
            prompt = next(begun, said.asked[first])
            pairs = [(said.answers[place], scored.scores[place]) for place in own]
            answers = [
                replace(draft, reward=score.value, parts=score.parts) for draft, score in pairs if score is not None
            ]
            groups.append(Group(prompt.tokens, tuple(answers), prompt.row, version))
        report.group(groups, longest=self.plan.max_new_tokens)
        return [group for group in groups if group.answers]

    def _played(
        self, episodes: Episodes, asked: Sequence[Prompt], speaker: Speaker, sampling: Sampling
    ) -> tuple[list[Prompt], list[Answer], list[Sample | Verdict], int]:
        """Exchanges instead of answers. Those that ended without a verdict are scored as a whole."""
        seeds = [seed_of(sampling.seed, place // self.plan.answers) for place in range(len(asked))]
        played = episodes.play(asked, speaker, sampling, seeds=seeds)
        answers = [
            replace(each.answer, trained=each.answer.ended == "stop" or self.plan.cut == "keep") for each in played
        ]
        retried = sum(each.retried for each in played)
        return [each.prompt for each in played], answers, [each.verdict for each in played], retried

    def _answer(self, spoken: Spoken) -> Answer:
        ended: Literal["stop", "length"] = "stop" if spoken.ended == "stop" else "length"
        return Answer(
            spoken.tokens,
            np.ones(len(spoken.tokens), dtype=np.bool_),
            np.array(spoken.log_probs, dtype=np.float32),
            reward=float("nan"),
            ended=ended,
            text=self.decode(spoken.tokens),
            trained=ended == "stop" or self.plan.cut == "keep",
        )


def sample_of(prompt: Prompt, answer: Answer) -> Sample:
    """An answer as rewards see it."""
    return Sample(
        prompt=prompt.messages, answer=answer.text, tokens=tuple(answer.tokens.tolist()), ended=answer.ended,
        facts=prompt.facts, text=prompt.text,
    )  # fmt: skip


def seed_of(*numbers: int) -> int:
    """A seed that is another one for other numbers."""
    return int(np.random.SeedSequence(list(numbers)).generate_state(1, np.uint64)[0]) >> 1
