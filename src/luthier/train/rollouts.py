"""Rollouts as a source: prompts are answered by the model as it is now, answers are scored, and become trees to train.

prompts -> sampled answers -> rewards -> groups -> notes (old, reference, values) -> advantages -> steps of a replay

The loop knows nothing of this. What the source holds between two steps, the trees of its replay with their notes, is
saved with every checkpoint, so a run that is killed in the middle of a replay goes on bit for bit. Random numbers are
functions of (seed, rollout, attempt, prompt, answer), so that nothing else has to be remembered.
A rollout may run ahead: the next one is then sampled before the steps of this one, with the weights that these begin
with, and waits. So a sampler and a trainer side by side would see the same weights as they do here, one after the
other, and come to the same numbers. What is then trained was said by a policy that is a rollout behind; what the one
that learns finds likelier counts for more, up to a limit, and what it finds less likely for less.
Equation: w_t = min(exp(log pi_begin(y_t) - log pi_sampled(y_t)), most), multiplied with the advantage.
Source: Ouyang et al., arXiv 2203.02155, appendix C.4; Shao et al., arXiv 2402.03300, algorithm 1; drawing again where
    all answers of a group are worth the same: Yu et al., arXiv 2503.14476, section 3.2; a step off: Noukhovitch et al.,
    arXiv 2410.18252; truncated importance weights: Espeholt et al., arXiv 1802.01561, section 4.1; ratios from the
    policy that steps begin with: Hilton et al., arXiv 2110.00641.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, final

import numpy as np
from numpy.typing import NDArray

from luthier.core.errors import DataError, RecipeError
from luthier.core.events import Event
from luthier.data.forest import Ints, Note, Tree
from luthier.data.rollout_learner import RolloutLearner
from luthier.data.rollouts import (
    Answer,
    Arrays,
    Group,
    Prompt,
    as_arrays,
    from_arrays,
    groups_as_arrays,
    groups_from_arrays,
    leaf_notes,
    noting,
)
from luthier.data.sample import Sample
from luthier.model.speaker import PolicySampling, Sampling, Speaker, SpeakerElsewhere, Spoken
from luthier.rewards import Verdict
from luthier.train.episodes import Episodes, settled
from luthier.train.pass_report import PassReport
from luthier.train.rollout_report import RolloutReport
from luthier.train.scoring import Scored
from luthier.train.source import Cursor, Source

MISMATCH: Final = 0.05
"""A mean difference of log-probabilities between sampler and trainer from which on a run is warned."""

Scorer = Callable[[Sequence[Sample]], Scored]
Recall = Callable[[Sequence[Tree], frozenset[Note]], list[Tree]]
Decode = Callable[[Ints], str]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a rollout is made: so many `prompts`, each answered `answers` times, in at most `max_new_tokens` tokens.

    An answer that was cut off is kept as it is, or left untrained (`mask`), though its group still knows its worth.
    With `redraws`, groups whose answers were all worth the same are replaced by those of other prompts, in at most so
    many attempts. With a `lag` of 1 each rollout is sampled before the steps of the one before it, and a token counts
    for `correction` at most.
    """

    prompts: int
    answers: int
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    cut: Literal["keep", "mask"] = "keep"
    redraws: int = 0
    lag: int = 0
    correction: float = 2.0

    def sampling(self, temperature: float, seed: int) -> Sampling:
        """How answers are drawn: from the very policy that is trained, so nothing is cut off or steered."""
        return PolicySampling(
            max_new_tokens=self.max_new_tokens, temperature=temperature, seed=seed, stop_ids=self.stop_ids
        )


@final
class RolloutSource(Source):
    """Steps of replays, one rollout after another."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        objective: RolloutLearner,
        speaker: Speaker,
        score: Scorer,
        *,
        recall: Recall,
        decode: Decode,
        plan: Plan,
        seed: int,
        episodes: Episodes | None = None,
        beside: Source | None = None,
    ) -> None:
        if not prompts:
            raise DataError(
                "there are 0 prompts to answer", allowed="at least 1", do="look at the counts of: luthier data check"
            )
        self.prompts = prompts
        self.objective = objective
        self.speaker = speaker
        self.score = score
        self.recall = recall
        self.decode = decode
        self.plan = plan
        self.episodes = episodes
        self.beside = beside
        """Rows that each step imitates beside what is learned from rollouts."""
        self.seed = seed
        self.leash = objective.leash
        self._reports: list[RolloutReport] = []
        self._cursor = Cursor()
        self._number = 0
        """How many rollouts were made."""
        self._steps = 0
        """How many steps were taken from all of them: the version of the policy."""
        self._at = 0
        """How many of them from the rollout at hand."""
        self._trees: list[Tree] = []
        self._ahead: list[Group] = []
        """The rollout that was sampled ahead, and waits."""
        self._warned = False

    # ------------------------------------------------------------------------------------------------- as a source

    def next_step(self) -> list[Tree]:
        if self._at >= self._replays:
            self._renew()
        trees = self._minibatch(self._at)
        self._at += 1
        self._steps += 1
        return trees if self.beside is None else [*trees, *weighing(self.beside.next_step(), trees)]

    def _renew(self) -> None:
        """The next rollout. Where it fails the source is what it was, so a checkpoint can still be made of it."""
        before = self._cursor, self._number, list(self._reports), self._ahead, self.leash
        try:
            groups = self._ahead or self._sampled()
            self._ahead = self._sampled() if self.plan.lag else []
            self._trees, self._at = self._learnable(groups), 0
        except BaseException:
            self._cursor, self._number, self._reports, self._ahead, self.leash = before
            raise

    @property
    def report(self) -> RolloutReport | None:
        """What the newest rollout was, until it is told."""
        return self._reports[-1] if self._reports else None

    @property
    def cursor(self) -> Cursor:
        return self._cursor

    def seek(self, cursor: Cursor) -> None:
        self._cursor = cursor

    def told(self, passed: PassReport) -> list[Event]:
        events = [Event("rollout", report.values()) for report in self._reports]
        self._reports = []
        if isinstance(self.speaker, SpeakerElsewhere) and (found := self.speaker.told()):
            events.append(Event("engine", found))
        mismatch = passed.figures.get("mismatch", 0.0)
        # Where rollouts lag, the policy has moved on in between, which is no fault and is corrected for.
        if mismatch > MISMATCH and not self._warned and not self.plan.lag:
            self._warned = True
            said = (
                f"sampler and trainer differ by {mismatch:.3f} in the log-probability of a sampled token on average "
                f"(at most {passed.figures.get('mismatch_most', 0.0):.2f}), more than {MISMATCH}: answers are not "
                "those of the policy that is trained; set objective.correction to 2, or precision to float32"
            )
            events.append(Event("warning", {"what": "mismatch", "message": said}))
        return events

    def close(self) -> None:
        """Let go of what the speaker has outside of this process; no step is asked for any more."""
        if isinstance(self.speaker, SpeakerElsewhere):
            self.speaker.close()

    def held(self) -> Arrays:
        numbers = [self._number, self._steps, self._at, int(self._warned)]
        left = self._trees if self._at < self._replays else []
        place = None if self.beside is None else self.beside.cursor
        return {
            "numbers": np.array(numbers, dtype=np.int64),
            "leash": np.array([self.leash], dtype=np.float64),
            "beside": np.array([] if place is None else [place.epoch, place.used], dtype=np.int64),
            **as_arrays(left),
            **{f"ahead-{name}": each for name, each in groups_as_arrays(self._ahead).items()},
        }

    def hold(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        if "numbers" not in arrays:
            return
        self._number, self._steps, self._at, warned = arrays["numbers"].tolist()
        self._warned = bool(warned)
        self.leash = float(arrays["leash"][0])
        if self.beside is not None:
            epoch, used = arrays["beside"].tolist()
            self.beside.seek(Cursor(epoch, used))
        self._trees = from_arrays(arrays)
        ahead = {name.removeprefix("ahead-"): each for name, each in arrays.items() if name.startswith("ahead-")}
        self._ahead = groups_from_arrays(ahead)

    # --------------------------------------------------------------------------------------------------- a replay

    @property
    def _replays(self) -> int:
        """Steps from the rollout at hand."""
        return self.objective.passes * self._minibatches if self._trees or self._at else 0

    @property
    def _minibatches(self) -> int:
        return self.objective.minibatches

    def _minibatch(self, at: int) -> list[Tree]:
        """The trees of a step: each pass goes through all of them in an order of its own."""
        done, place = divmod(at, self._minibatches)
        if self._minibatches == 1:
            return list(self._trees)
        number = self._number - bool(self._ahead)
        order = np.random.default_rng([self.seed, 1, number, done]).permutation(len(self._trees))
        return [self._trees[index] for index in np.array_split(order, self._minibatches)[place]]

    # -------------------------------------------------------------------------------------------------- a rollout

    def _sampled(self) -> list[Group]:
        """A new rollout by the model as it is."""
        began = time.perf_counter()
        report = RolloutReport(version=self._steps, compared=self.objective.rewarded)
        kept: list[Group] = []
        for attempt in range(self.plan.redraws + 1):
            groups = self._groups(self._take(self.plan.prompts - len(kept)), attempt, report)
            last = attempt == self.plan.redraws
            kept += groups if last else [group for group in groups if not group.alike]
            report.counts["redrawn"] += 0 if last else sum(group.alike for group in groups)
            if len(kept) >= self.plan.prompts:
                break
        kept = [group for group in kept if group.trained]
        if len(kept) < self._minibatches:
            raise RecipeError(
                f"rollout {self._number} has {len(kept)} groups with an answer to train, for {self._minibatches} "
                f"steps: {report.why()}",
                do="look at the rewards' errors and at rollouts.max_new_tokens; raise rollouts.prompts",
            )
        report.sampled_in(time.perf_counter() - began)
        self._number += 1
        report.seconds = time.perf_counter() - began
        self._reports.append(report)
        return kept

    def _learnable(self, groups: Sequence[Group]) -> list[Tree]:
        """A rollout as trees with advantages, by the model as its steps begin with it."""
        began = time.perf_counter()
        wanted = self.objective.recalled | frozenset[Note](["old"] if self.plan.lag else [])
        trees = self.recall([self.objective.grow(group) for group in groups], wanted)
        trees, self.leash = self.objective.credited(groups, trees, leash=self.leash)
        if self.plan.lag:
            trees = [corrected(tree, self.plan.correction) for tree in trees]
        for report in self._reports:
            report.leash = self.leash
        if self._reports:
            self._reports[-1].seconds += time.perf_counter() - began
        return trees

    def _take(self, count: int) -> list[Prompt]:
        """The next prompts, in an order that is a pure function of (seed, epoch)."""
        taken: list[Prompt] = []
        while len(taken) < count:
            epoch, used = self._cursor.epoch, self._cursor.used
            if used >= len(self.prompts):
                epoch, used = epoch + 1, 0
            order = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.prompts))
            own = order[used : used + count - len(taken)]
            taken += [self.prompts[int(index)] for index in own]
            self._cursor = Cursor(epoch, used + len(own))
        return taken

    def _groups(self, prompts: Sequence[Prompt], attempt: int, report: RolloutReport) -> list[Group]:
        """The answers to some prompts, scored."""
        seed = seed_of(self.seed, self._number, attempt)
        sampling = self.plan.sampling(self.objective.temperature, seed)
        asked = [prompt for prompt in prompts for _ in range(self.plan.answers)]
        if self.episodes is None:
            spoken = self.speaker.speak([prompt.tokens for prompt in asked], sampling)
            drafts = [self._answer(each) for each in spoken]
            scored = self.score([sample_of(prompt, draft) for prompt, draft in zip(asked, drafts, strict=True)])
        else:
            asked, drafts, scored = self._played(self.episodes, asked, sampling)
        report.count(scored, drafts)
        groups = []
        for number in range(len(prompts)):
            prompt = asked[number * self.plan.answers]
            own = range(number * self.plan.answers, (number + 1) * self.plan.answers)
            pairs = [(drafts[place], scored.scores[place]) for place in own]
            answers = [
                replace(draft, reward=score.value, parts=score.parts) for draft, score in pairs if score is not None
            ]
            groups.append(Group(prompt.tokens, tuple(answers), prompt.row, self._steps))
        report.group(groups, longest=self.plan.max_new_tokens)
        return [group for group in groups if group.answers]

    def _played(
        self, episodes: Episodes, asked: Sequence[Prompt], sampling: Sampling
    ) -> tuple[list[Prompt], list[Answer], Scored]:
        """Exchanges instead of answers. Those that ended without a verdict are scored as a whole."""
        seeds = [seed_of(sampling.seed, place // self.plan.answers) for place in range(len(asked))]
        prompts: list[Prompt] = []
        answers: list[Answer] = []
        verdicts: list[Sample | Verdict] = []
        for prompt, answer, verdict in episodes.play(asked, self.speaker, sampling, seeds=seeds):
            prompts.append(prompt)
            answers.append(replace(answer, trained=answer.ended == "stop" or self.plan.cut == "keep"))
            verdicts.append(verdict)
        return prompts, answers, settled(verdicts, self.score)

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


def weighing(rows: Sequence[Tree], beside: Sequence[Tree]) -> list[Tree]:
    """Rows that weigh together as many times what the trees `beside` them weigh as each of them weighed before."""
    factor = np.float32(sum(tree.weight for tree in beside) / len(rows))
    return [
        replace(row, segments=tuple(replace(each, weights=each.weights * factor) for each in row.segments))
        for row in rows
    ]


def corrected(tree: Tree, most: float) -> Tree:
    """The tree with what each token counts for: how much likelier it was when its steps began than when it was sampled,
    and `most` at most."""
    pairs = zip(leaf_notes(tree, "old"), leaf_notes(tree, "sampled"), strict=True)
    return noting(tree, "correction", [np.minimum(np.exp(old - sampled), most) for old, sampled in pairs])


def sample_of(prompt: Prompt, answer: Answer) -> Sample:
    """An answer as rewards see it."""
    tokens = tuple(answer.tokens.tolist())
    return Sample(prompt=prompt.messages, answer=answer.text, tokens=tokens, ended=answer.ended, facts=prompt.facts)


def seed_of(*numbers: int) -> int:
    """A seed that is another one for other numbers."""
    return int(np.random.SeedSequence(list(numbers)).generate_state(1, np.uint64)[0]) >> 1

