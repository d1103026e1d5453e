"""Ladder: several rewards added up, in which a later one counts only where the gates below it are passed.

Idea: an answer that does not compile is not asked whether it is right, and a form is worth little by itself. Rungs are
climbed in order; each adds its weight times its value. Below a gate that is not passed nothing more is asked (so no
sandbox starts for it) and nothing more is added. Each rung stays visible by its name, and is 0 where nobody came.
Equation: r = sum_k w_k r_k prod_{j < k, j a gate} 1[r_j >= pass_j]
Source: Predibase, reinforcement fine-tuning of PyTorch to Triton (formatting, compilation, correctness, speed)
Cost: that of its rungs, for the samples that reach them.
Use when: what counts can only be had after something simpler (format, compiles, right, fast).
Not when: there is one reward; it needs no ladder. An environment is no rung: it has a ladder as its reward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, final

from pydantic import Field, model_validator

from luthier.core.chosen import Chosen, choose
from luthier.core.errors import RecipeError
from luthier.core.knobs import Knobs
from luthier.data.sample import Sample
from luthier.rewards import Environment, Reward, RewardError, Score, Tools, Verdict

_OWN = ("reward", "name", "weight", "gate", "pass_at")


class Rung(Knobs):
    """A reward of the ladder: `{method: format, weight: 0.1}`, its knobs beside those of the rung."""

    reward: Annotated[Reward, Chosen("rewards")] = Field(description="the reward, by its method and knobs")
    name: str = Field("", description="what its part is called; empty: the name of the method")
    weight: float = Field(1.0, description="what its value is multiplied by")
    gate: bool = Field(False, description="whether later rungs count only where this one is passed")
    pass_at: float = Field(1.0, description="the value from which on a gate is passed")

    @model_validator(mode="before")
    @classmethod
    def _knobs_beside(cls, value: Any) -> Any:
        if isinstance(value, str | Reward):
            return {"reward": value}
        if not isinstance(value, Mapping) or "method" not in value:
            return value
        own = {key: item for key, item in value.items() if key in _OWN}
        if "reward" in own:
            raise _both(value)
        return {"reward": {key: item for key, item in value.items() if key not in _OWN}, **own}

    @property
    def called(self) -> str:
        """The name of its part."""
        return self.name or self.reward.method_name()


def _both(value: Mapping[str, Any]) -> RecipeError:
    """The error for a rung with method and reward: what is meant depends on whether the method has a reward too."""
    kind, name = Chosen("rewards").kind_of(value), value["method"]
    do = f"leave one of them out: {{method: {name}, weight: 0.5}}"
    if "reward" in kind.model_fields:
        # An exchange is had by what is outermost; a rung would only see how it ended.
        do = f"put the ladder into it: {{method: {name}, reward: {{method: ladder, rungs: [numeric, length]}}}}"
    return RecipeError(f"a rung has both method ({name}) and reward", allowed="one of the two", do=do)


@final
class Ladder(Reward):
    """Rewards in order, with gates."""

    rungs: tuple[Rung, ...] = Field(min_length=1, strict=False, description="the rewards, lowest first")

    @model_validator(mode="after")
    def _names_differ(self) -> Ladder:
        names = [rung.called for rung in self.rungs]
        if twice := [name for name in names if names.count(name) > 1]:
            raise RecipeError(f"two rungs are called {twice[0]!r}", do="give one a name: {method: M, name: N}")
        return self

    @model_validator(mode="after")
    def _judges_what_was_said(self) -> Ladder:
        for rung in self.rungs:
            if isinstance(rung.reward, Environment):
                # A rung judges what was said; an exchange is what the whole ladder judges.
                name = rung.reward.method_name()
                raise RecipeError(
                    f"the rung {rung.called!r} is an environment, and nobody would play it: a ladder judges answers",
                    allowed="rewards that open no episode",
                    do=f"put the ladder into it: {{method: {name}, reward: {{method: ladder, rungs: [...]}}}}, with "
                    f"the reward of {name} as a rung",
                )
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        ends = [[rung.weight * end for end in rung.reward.bounds] for rung in self.rungs]
        # A rung that is not reached adds nothing.
        return sum(min(0.0, *pair) for pair in ends), sum(max(0.0, *pair) for pair in ends)

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(column for rung in self.rungs for column in rung.reward.columns))

    @property
    def needs(self) -> frozenset[str]:
        return frozenset[str]().union(*(rung.reward.needs for rung in self.rungs))

    def check(self, facts: Mapping[str, Any]) -> None:
        for rung in self.rungs:
            rung.reward.check(facts)

    def score(self, samples: Sequence[Sample], tools: Tools) -> list[Verdict]:
        climbs = [_Climb(sample, {rung.called: 0.0 for rung in self.rungs}) for sample in samples]
        for rung in self.rungs:
            going = [climb for climb in climbs if climb.going]
            verdicts = rung.reward.score([climb.sample for climb in going], tools) if going else []
            for climb, verdict in zip(going, verdicts, strict=True):
                climb.reach(rung, verdict)
        return [climb.verdict() for climb in climbs]


def ladder_of(value: Any) -> Reward:
    """The reward of a recipe: one method, or a list of rungs. Raises RecipeError."""
    return choose("rewards", Reward, {"method": "ladder", "rungs": value} if isinstance(value, list) else value)


@dataclass
class _Climb:
    """How far one sample has come."""

    sample: Sample
    parts: dict[str, float]
    value: float = 0.0
    going: bool = True
    applied: bool = False
    failure: RewardError | None = None
    told: list[tuple[str, str]] = field(default_factory=list)

    def reach(self, rung: Rung, verdict: Verdict) -> None:
        if isinstance(verdict, RewardError):
            self.failure, self.going = verdict, False
        elif verdict is not None:
            self.applied = True
            self.value += rung.weight * verdict.value
            self.parts[rung.called] = verdict.value
            self.parts |= {f"{rung.called}/{name}": number for name, number in verdict.parts.items()}
            self.told.append((verdict.reason and f"{rung.called}: {verdict.reason}", verdict.feedback))
            self.going = not rung.gate or verdict.value >= rung.pass_at

    def verdict(self) -> Verdict:
        if self.failure is not None or not self.applied:
            return self.failure
        reasons, feedback = ("; ".join(filter(None, texts)) for texts in zip(*self.told, strict=True))
        return Score(self.value, self.parts, reasons, feedback)
