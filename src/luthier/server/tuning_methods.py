"""The methods of OpenAI's fine-tunes, and what each is in a recipe: supervised, dpo, reinforcement.

A method is an entry of a table. What the API knows and this trainer does not do is refused by its name, never left out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, final

from pydantic import Field

from luthier.core import catalog
from luthier.core.chosen import choose
from luthier.core.errors import RecipeError
from luthier.core.nearest import did_you_mean
from luthier.recipes.schemas.reinforce import RolloutKnobs
from luthier.rewards import Reward
from luthier.server.bodies import Body, Number

Auto = Literal["auto"]
Count = Annotated[int, Field(ge=1, le=4096)]


class Hyper(Body):
    """How it is trained; `auto` is luthier's own default."""

    n_epochs: Annotated[int, Field(ge=1, le=1000)] | Auto = "auto"
    batch_size: Count | Auto = "auto"
    learning_rate_multiplier: Annotated[Number, Field(gt=0, le=1000)] | Auto = "auto"


class PairHyper(Hyper):
    """The same, and how short the leash to the base is."""

    beta: Annotated[Number, Field(gt=0, le=1000)] | Auto = "auto"


class ReinforcementHyper(Hyper):
    """The same of prompts: a batch is the prompts of a step, compute how many answers each has, 8 by default."""

    eval_interval: Count | Auto = "auto"
    eval_samples: Count | Auto = "auto"
    compute_multiplier: Annotated[Number, Field(ge=0.25, le=16)] | Auto = "auto"
    reasoning_effort: Literal["default"] = "default"


class Supervised(Body):
    """Supervised fine-tuning."""

    hyperparameters: Hyper = Field(default_factory=Hyper)


class Pairs(Body):
    """Learning from pairs of answers."""

    hyperparameters: PairHyper = Field(default_factory=PairHyper)


class Reinforcement(Body):
    """Learning from what a grader says of the model's own answers."""

    grader: dict[str, Any]
    hyperparameters: ReinforcementHyper = Field(default_factory=ReinforcementHyper)


class TuningMethod(Body):
    """What is optimised: `type` names one of the others."""

    type: str = Field("supervised", max_length=64)
    supervised: Supervised | None = None
    dpo: Pairs | None = None
    reinforcement: Reinforcement | None = None

    @property
    def given(self) -> dict[str, Supervised | Pairs | Reinforcement]:
        """Those that are there, by name."""
        found = {"supervised": self.supervised, "dpo": self.dpo, "reinforcement": self.reinforcement}
        return {name: one for name, one in found.items() if one is not None}


class Way(ABC):
    """What a method of the API is here. The name of its objective says whether the trainer can do it."""

    hyper: type[Hyper]
    objective: str

    @abstractmethod
    def recipe(self, hyper: Hyper, method: TuningMethod | None, base: tuple[str, str]) -> dict[str, Any]:
        """What it adds to a recipe; `base` is the name of the model that is served, and where it comes from."""


@final
@dataclass(frozen=True)
class OfRows(Way):
    """Learning from rows, by an objective, of which some hyperparameters are knobs."""

    hyper: type[Hyper]
    objective: str
    knobs: tuple[str, ...] = ()

    def recipe(self, hyper: Hyper, method: TuningMethod | None, base: tuple[str, str]) -> dict[str, Any]:
        given = {name: value for name in self.knobs if (value := getattr(hyper, name)) != "auto"}
        batch = {} if hyper.batch_size == "auto" else {"batch": {"rows": hyper.batch_size}}
        return {"objective": {"method": self.objective, **given}, **batch}


@final
@dataclass(frozen=True)
class OfRollouts(Way):
    """Learning from graded answers."""

    objective: str
    hyper: type[Hyper] = ReinforcementHyper

    def recipe(self, hyper: Hyper, method: TuningMethod | None, base: tuple[str, str]) -> dict[str, Any]:
        chosen = method.reinforcement if method is not None else None
        if chosen is None or not isinstance(hyper, ReinforcementHyper):
            raise RecipeError("method.reinforcement is missing", allowed="a grader, and hyperparameters")
        reward = choose("rewards", Reward, {"method": "grader", "grader": chosen.grader})
        judged = {"judge": _judge(chosen.grader, base)} if "judge" in reward.needs else {}
        prompts = {} if hyper.batch_size == "auto" else {"prompts": hyper.batch_size}
        if hyper.compute_multiplier != "auto":
            usual = int(RolloutKnobs.model_fields["answers"].default)
            prompts["answers"] = max(2, round(usual * float(hyper.compute_multiplier)))
        told = {"every": hyper.eval_interval, "max_rows": hyper.eval_samples}
        return {
            "recipe": "reinforce", "reward": reward.as_recipe(), **judged, "rollouts": prompts,
            "objective": {"method": self.objective},
            "evaluation": {key: value for key, value in told.items() if value != "auto"},
        }  # fmt: skip


WAYS: Final[Mapping[str, Way]] = {
    "supervised": OfRows(Hyper, "sft"),
    "dpo": OfRows(PairHyper, "dpo", ("beta",)),
    "reinforcement": OfRollouts("grpo"),
}


def ways() -> dict[str, Way]:
    """The methods that the trainer can do."""
    there = catalog.names("objectives")
    return {name: way for name, way in WAYS.items() if way.objective in there}


def way_of(method: TuningMethod | None, hyper: Hyper | None) -> tuple[Way, Hyper]:
    """The method that is asked for and its hyperparameters, wherever they stand. Raises RecipeError."""
    known, kind = ways(), method.type if method is not None else "supervised"
    if kind not in known:
        raise RecipeError(f"method.type is {kind!r:.80}", allowed=", ".join(known), do=did_you_mean(kind, list(known)))
    given = method.given if method is not None else {}
    if odd := [name for name in given if name != kind]:
        raise RecipeError(f"method has {odd[0]} and its type is {kind}", allowed=f"method.{kind}")
    way, chosen = known[kind], given.get(kind)
    plain = way.hyper.model_validate(hyper.model_dump()) if hyper is not None else way.hyper()
    return way, chosen.hyperparameters if chosen is not None else plain


def _judge(grader: Mapping[str, Any], base: tuple[str, str]) -> str:
    """Where the model that graders ask comes from: it is the one that is served, as it is before it is trained."""
    name, source = base
    inner = grader["graders"].values() if grader.get("type") == "multi" else (grader,)
    for each in inner:
        if each.get("type") in ("score_model", "label_model") and each.get("model") != name:
            raise RecipeError(f"the grader's model is {each.get('model')!r:.80}", allowed=f"the base, {name}")
    return source
