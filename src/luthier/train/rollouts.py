"""Rollouts as a source: prompts are answered by the model as it is now, answers are scored, and become trees to train.

prompts -> sampled answers -> rewards -> groups -> notes (old, reference, values) -> advantages -> steps of a replay

The loop knows nothing of this. What the source holds between two steps, the trees of its replay with their notes, is
saved with every checkpoint, so a run that is killed in the middle of a replay goes on bit for bit. Random numbers are
functions of (seed, rollout, attempt, prompt, answer), so that nothing else has to be remembered (rolling.py).
A rollout may run ahead: the next one is then sampled with the weights that the steps of this one begin with. In this
process it is sampled before these steps, and waits; an engine somewhere else samples it while they are taken, and both
come to the same numbers. One that is under way is saved as where it started and the weights it is sampled with, and is
sampled again by whoever goes on. What is then trained was said by a policy that is a rollout behind; what the one that
learns finds likelier counts for more, up to a limit, and what it finds less likely for less.
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
from functools import partial
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from luthier.core.errors import DataError, LuthierError
from luthier.core.events import Event
from luthier.core.waiting import Waits
from luthier.data.forest import Note, Tree
from luthier.data.rollout_learner import RolloutLearner
from luthier.data.rollouts import (
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
from luthier.model.speaker import Pinned, Speaker, SpeakerElsewhere
from luthier.train.episodes import Episodes
from luthier.train.flight import Flight
from luthier.train.pass_report import PassReport
from luthier.train.rolling import Decode, Plan, Rolled, Roller, Said, Scorer, Start
from luthier.train.rollout_report import RolloutReport
from luthier.train.source import Cursor, Source

MISMATCH: Final = 0.05
"""A mean difference of log-probabilities between sampler and trainer from which on a run is warned."""
LOST: Final = 3
"""How often an engine that has lost the weights gets them again for the same answers."""
_LAST_SECONDS: Final = 5.0
"""How long what is under way may take to end, when nobody waits for it any more."""

Recall = Callable[[Sequence[Tree], frozenset[Note]], list[Tree]]


@dataclass(frozen=True)
class _Due:
    """A rollout that is to come: where it starts, by which weights, and who samples it now, if anybody does."""

    start: Start
    weights: Mapping[str, NDArray[Any]]
    pinned: Pinned | None = None
    flight: Flight[Rolled | Said] | None = None


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
        waited: Sequence[Waits] = (),
    ) -> None:
        if not prompts:
            raise DataError(
                "there are 0 prompts to answer", allowed="at least 1", do="look at the counts of: luthier data check"
            )
        self.roller = Roller(
            prompts=prompts, objective=objective, score=score, decode=decode, plan=plan, seed=seed, episodes=episodes
        )
        self.objective = objective
        self.speaker = speaker
        self.recall = recall
        self.plan = plan
        self.beside = beside
        """Rows that each step imitates beside what is learned from rollouts."""
        self.waited = waited
        """Whoever else is waited for here: a judge."""
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
        self._due: _Due | None = None
        """The rollout that somebody else samples ahead."""
        self._expected: int | None = None
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
        due = None if self._due is None else replace(self._due, pinned=None, flight=None)
        before = self._cursor, self._number, list(self._reports), self._ahead, due, self.leash
        try:
            groups = self._ahead or self._sampled()
            self._ahead = []
            if self.plan.lag and self._wants_more:
                if isinstance(self.speaker, SpeakerElsewhere):
                    self._due = self._flown(self.speaker, self._start)
                else:
                    self._ahead = self._sampled()
            self._trees, self._at = self._learnable(groups), 0
        except BaseException:
            self._cursor, self._number, self._reports, self._ahead, self._due, self.leash = before
            raise

    @property
    def _wants_more(self) -> bool:
        """Whether there are steps after those of the rollout at hand."""
        return self._expected is None or self._steps + self._replays < self._expected

    def expect(self, steps: int) -> None:
        self._expected = steps

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

    def bind(self, tell: Callable[[Event], None], stop: Callable[[], LuthierError | None]) -> None:
        """Who is told of long waits, and what ends them."""
        for waits in (*self.waited, *([self.speaker.waits] if isinstance(self.speaker, SpeakerElsewhere) else [])):
            waits.bind(tell, stop)

    def close(self) -> None:
        """Let go of what the speaker has outside of this process; no step is asked for any more."""
        if isinstance(self.speaker, SpeakerElsewhere):
            for waits in self.waited:
                waits.end()
            self.speaker.end()
            if self._due is not None and self._due.flight is not None:
                self._due.flight.join(_LAST_SECONDS)
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
            **({} if self._due is None else _due_as_arrays(self._due)),
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
        self._ahead = groups_from_arrays(_below("ahead-", arrays))
        self._due = _due_from_arrays(arrays)

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
        order = np.random.default_rng([self.roller.seed, 1, number, done]).permutation(len(self._trees))
        return [self._trees[index] for index in np.array_split(order, self._minibatches)[place]]

    # -------------------------------------------------------------------------------------------------- a rollout

    @property
    def _start(self) -> Start:
        """Where the next rollout starts."""
        return Start(self._cursor, self._number, self._steps)

    def _sampled(self) -> list[Group]:
        """The next rollout: the one that is due, or a new one by the model as it is."""
        if isinstance(self.speaker, SpeakerElsewhere):
            rolled = self._landed(self.speaker, self._due or self._flown(self.speaker, self._start))
            self._due = None
        else:
            rolled = self.roller.roll(self._start, self.speaker)
        self._cursor = rolled.cursor
        self._number += 1
        self._reports.append(rolled.report)
        return rolled.groups

    def _flown(
        self, speaker: SpeakerElsewhere, start: Start, weights: Mapping[str, NDArray[Any]] | None = None
    ) -> _Due:
        """A rollout that is under way from now on, by the weights as they are or by others."""
        pinned = speaker.pinned(self.roller.sampling(start), weights)
        work: Callable[[], Rolled | Said] = partial(
            self.roller.roll if self.plan.scored_beside else self.roller.say, start, pinned
        )
        return _Due(start, pinned.weights, pinned, Flight(work, speaker.waits))

    def _landed(self, speaker: SpeakerElsewhere, due: _Due) -> Rolled:
        """What has come of a rollout under way. One that nobody samples, or whose weights were lost, is sampled now."""
        left = LOST
        while True:
            if due.flight is None or due.pinned is None:
                due = self._flown(speaker, due.start, due.weights)
            left -= 1
            try:
                return self._finished(due)
            except LuthierError:
                if due.pinned is None or not due.pinned.lost or not left:
                    raise
            due = replace(due, pinned=None, flight=None)

    def _finished(self, due: _Due) -> Rolled:
        if due.flight is None or due.pinned is None:
            raise TypeError(f"rollout {due.start.number} is not under way")
        found = due.flight.result()
        return found if isinstance(found, Rolled) else self.roller.finish(due.start, found, due.pinned)

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


def _due_as_arrays(due: _Due) -> Arrays:
    """What a rollout that is to come has to be sampled from, by whoever goes on."""
    start = [due.start.cursor.epoch, due.start.cursor.used, due.start.number, due.start.version]
    return {"due": np.array(start, dtype=np.int64), **{f"due-{name}": each for name, each in due.weights.items()}}


def _due_from_arrays(arrays: Mapping[str, NDArray[Any]]) -> _Due | None:
    """The rollout that `_due_as_arrays` was given; None without one."""
    if "due" not in arrays:
        return None
    epoch, used, number, version = arrays["due"].tolist()
    return _Due(Start(Cursor(epoch, used), number, version), _below("due-", arrays))


def _below(prefix: str, arrays: Mapping[str, NDArray[Any]]) -> Arrays:
    return {name.removeprefix(prefix): each for name, each in arrays.items() if name.startswith(prefix)}
