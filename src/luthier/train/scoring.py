"""Scoring: rewards asked about samples, again where they failed, and what cannot be scored left out and counted.

Idea: a reward that raises, or gives a number that is not finite, has not said that an answer is bad. Samples whose
reward failed are asked about again together, the last time one by one, so that one sample cannot take the others of
its batch with it. What fails then is left out: it is no 0, it is in no mean, and it is counted by what happened.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Final, final

from luthier.core.errors import DataError, LuthierError, RecipeError
from luthier.data.sample import Sample
from luthier.rewards import Reward, RewardError, Score, Tools, Verdict
from luthier.sandbox.program import Limits
from luthier.sandbox.sandbox import Sandbox, open_sandbox

_REASONS: Final = 3
_LONGEST: Final = 200
"""How many reasons for which samples could not be scored are told, and letters of each."""
_MOST_LISTED: Final = 20
"""Rows that are listed where many cannot be scored; the others are counted."""
_MEND: Final = "mend the row or take it out of the data, or let the reward read another column"


@dataclass(frozen=True)
class Scored:
    """A score for each sample, in order; None where it is to be left out.

    `failures` are the errors of those that failed, `unasked` is how many the reward does not apply to, `retried` how
    often a sample was asked about again.
    """

    scores: tuple[Score | None, ...]
    failures: tuple[RewardError, ...] = ()
    unasked: int = 0
    retried: int = 0

    @property
    def means(self) -> Mapping[str, float]:
        """The mean of each part over the samples that have it, and of the value as "reward"."""
        there = [{"reward": score.value, **score.parts} for score in self.scores if score is not None]
        names = dict.fromkeys(name for numbers in there for name in numbers)
        columns = {name: [numbers[name] for numbers in there if name in numbers] for name in names}
        return {name: sum(column) / len(column) for name, column in columns.items()}

    @property
    def counts(self) -> Mapping[str, int]:
        """How many samples came, were left out because the reward failed or does not apply, and how many retries."""
        return {
            "samples": len(self.scores),
            "failed": len(self.failures),
            "unasked": self.unasked,
            "retried": self.retried,
        }

    @property
    def unscored(self) -> dict[str, int]:
        """How many samples have no score, by reason."""
        reasons = frequent(Counter(failure.received for failure in self.failures))
        more = {"other reasons": len(self.failures) - sum(reasons.values()), "the reward gave None": self.unasked}
        return {**reasons, **{reason: count for reason, count in more.items() if count}}

    @property
    def told(self) -> str:
        """What happened to those that failed, the most frequent first."""
        reasons = Counter(failure.received for failure in self.failures)
        return "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))

    @property
    def advice(self) -> str:
        """What the failures themselves advise, the most frequent of it; empty where they advise nothing."""
        return "".join(do for do, _ in Counter(failure.do for failure in self.failures).most_common(1))


def frequent(reasons: Counter[str]) -> dict[str, int]:
    """The most frequent of the reasons for which samples could not be scored, shortened, and how many each."""
    found: Counter[str] = Counter()
    for reason, count in reasons.most_common(_REASONS):
        found[reason if len(reason) <= _LONGEST else f"{reason[:_LONGEST]} ..."] += count
    return dict(found)


@final
class Sandboxes:
    """Sandboxes by their limits and modules: each is opened when it is first asked for, and all end together."""

    def __init__(self) -> None:
        self._open: dict[tuple[object, ...], Sandbox] = {}

    def __call__(
        self, limits: Limits, *, preload: tuple[str, ...] = (), environment: tuple[tuple[str, str], ...] = (),
        devices: tuple[str, ...] = (),
    ) -> Sandbox:  # fmt: skip
        """The sandbox with these limits; `preload`, `environment` and `devices` are those of `open_sandbox`."""
        asked = (limits, preload, environment, devices)
        if asked not in self._open:
            more = dict(environment)
            self._open[asked] = open_sandbox(limits, preload=preload, environment=more, devices=devices)
        return self._open[asked]

    def close(self) -> None:
        """End them all."""
        while self._open:
            self._open.popitem()[1].close()

    def __enter__(self) -> Sandboxes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()


def with_sandbox(reward: Reward, tools: Tools) -> Tools:
    """The tools, with a sandbox where the reward needs one and has none.

    Raises SandboxUnavailableError where no walls stand here: now, and not after the first answers were made.
    """
    if "sandbox" not in reward.needs or tools.sandbox is not None:
        return tools
    sandboxes = Sandboxes()
    sandboxes(Limits())
    # What rewards ask for has other limits.
    sandboxes.close()
    return replace(tools, sandbox=sandboxes)


@final
@dataclass
class Scoring:
    """A reward with its tools. `retries` is how often a sample that failed is asked about again.

    Held-out answers may be scored while a rollout is under way in another thread; who wrote a reward need not think of
    that, so one thread at a time asks it.
    """

    reward: Reward
    tools: Tools = field(default_factory=Tools)
    retries: int = 2
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False, compare=False)  # type: ignore[valid-type]

    def __post_init__(self) -> None:
        there = {"judge": self.tools.judge, "reward-model": self.tools.reward_model, "sandbox": self.tools.sandbox}
        if missing := sorted(name for name in self.reward.needs if there[name] is None):
            raise RecipeError(
                f"the reward {self.reward.method_name()} needs a {missing[0]}, and there is none",
                allowed=f"a recipe that says which {missing[0]} to use",
            )

    def check(self, rows: Iterable[tuple[Mapping[str, Any], str]]) -> None:
        """Raise one DataError that lists the data rows, each with its address, that answers to cannot be scored by.

        Raises RecipeError where none of them has a column that the reward reads.
        """
        columns, name = self.reward.columns, self.reward.method_name()
        count, lines, lacking = 0, _Listed(), _Listed()
        for facts, where in rows:
            count += 1
            if missing := [column for column in columns if column not in facts]:
                told = f"the reward {name} reads the column {missing[0]!r}, and the row has none"
                error = RecipeError(told, allowed=f"its columns: {', '.join(facts) or 'none'}", where=where)
                lacking.add(error)
                lines.add(error)
                continue
            try:
                self.reward.check(facts)
            except DataError as failure:
                told = f"{failure.where}: {failure.received}" if failure.where else failure.received
                lines.add(DataError(told, allowed=failure.allowed, do=failure.do, where=where))
        if lacking.first and lacking.count == count:
            raise lacking.first[0]
        if lines.first:
            raise lines.told(f"{lines.count:,} of {count:,} rows cannot be scored by the reward {name}")

    def score(self, samples: Sequence[Sample], *, step: int | None = None) -> Scored:
        """A score for each sample that can have one. Rewards are told the `step` of training where it is given."""
        tools = self.tools if step is None else replace(self.tools, step=step)
        verdicts: dict[int, Verdict] = dict(enumerate(self._ask(samples, tools)))
        retried = 0
        for attempt in range(self.retries):
            again = [at for at, verdict in verdicts.items() if isinstance(verdict, RewardError) and verdict.again]
            last = attempt == self.retries - 1
            for group in [[at] for at in again] if last else [again] * bool(again):
                retried += len(group)
                verdicts |= zip(group, self._ask([samples[at] for at in group], tools), strict=True)
        found = list(verdicts.values())
        return Scored(
            tuple(verdict if isinstance(verdict, Score) else None for verdict in found),
            tuple(verdict for verdict in found if isinstance(verdict, RewardError)),
            sum(verdict is None for verdict in found),
            retried,
        )

    def _ask(self, samples: Sequence[Sample], tools: Tools) -> list[Verdict]:
        if not samples:
            return []
        try:
            with self.lock:
                verdicts = self.reward.score(samples, tools)
        except RewardError as failure:
            return [_again(failure, sample) for sample in samples]
        except DataError as failure:
            if failure.do or type(failure) is not DataError:
                raise
            # What shows only when programs of a row are run; what can be seen has been looked for in all rows.
            raise DataError(failure.received, allowed=failure.allowed, do=_MEND, where=failure.where) from failure
        if len(verdicts) != len(samples):
            told = f"{self.reward.method_name()} gave {len(verdicts)} verdicts on {len(samples)} samples"
            raise RecipeError(told, allowed="one for each")
        return [_finite(verdict, sample) for verdict, sample in zip(verdicts, samples, strict=True)]


@dataclass
class _Listed:
    """Errors about rows: the first, which are listed, and how many there are."""

    first: list[LuthierError] = field(default_factory=list)
    count: int = 0

    def add(self, error: LuthierError) -> None:
        self.count += 1
        if self.count <= _MOST_LISTED:
            self.first.append(error)

    def told(self, what: str) -> DataError:
        more = [f"... ({self.count - len(self.first):,} more rows)"] * (self.count > len(self.first))
        lines = "".join(f"\n  {line}" for line in [*map(str, self.first), *more])
        return DataError(what + lines, do=_MEND)


def _again(failure: RewardError, sample: Sample) -> RewardError:
    """An error about a batch, as one about a sample of it."""
    error = RewardError(failure.received, allowed=failure.allowed, do=failure.do, where=failure.where).of(sample)
    error.__cause__ = failure
    return error


def _finite(verdict: Verdict, sample: Sample) -> Verdict:
    if isinstance(verdict, Score) and not verdict.finite:
        return RewardError(f"the reward is {verdict.value} of {dict(verdict.parts)}", allowed="finite").of(sample)
    return verdict
