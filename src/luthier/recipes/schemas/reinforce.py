"""The recipe of reinforcement learning: a fine-tune whose data are prompts, with a reward, and how rollouts are made.

Everything else is as in a fine-tune (schema.py), so that one bench, one loop and one ending serve both.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from luthier.core.chosen import Chosen, choose
from luthier.core.errors import RecipeError
from luthier.core.knobs import Knobs
from luthier.data.rollout_learner import RolloutLearner
from luthier.infer.sync import TOLERANCE
from luthier.objectives import Objective
from luthier.recipes.lint import require_rank
from luthier.recipes.schemas.finetune import FinetuneRecipe
from luthier.rewards import Reward
from luthier.rewards.ladder import ladder_of


class EngineKnobs(Knobs):
    """An engine somewhere else that makes the rollouts; its token is LUTHIER_ENGINE_TOKEN."""

    url: str = Field("", description="address of the engine, http(s)://HOST:PORT; empty: answers are sampled here")
    dialect: Literal["vllm", "luthier", "sglang"] = Field(
        "vllm", description="how it is spoken to; luthier is `luthier serve`"
    )
    adapters: str = Field("", description="folder in which the adapter is written each time, and which it can read")
    seen_as: str = Field("", description="what that folder is called on its machine; empty: the same")
    max_rank: int = Field(16, ge=1, description="the --max-lora-rank that vLLM was started with")
    tolerance: float = Field(
        TOLERANCE, gt=0, le=10, description="mean difference of its log-probabilities from ours that is let pass"
    )
    at_once: int = Field(16, ge=1, description="requests that are under way at a time")
    seconds: float = Field(600.0, gt=0, description="longest that it may take for an answer, in seconds")
    patience: float = Field(
        120.0, ge=0, description="how long one that is away or overloaded is asked again, in seconds"
    )
    insecure_http: bool = Field(False, description="let the token travel to another machine without TLS")

    @model_validator(mode="after")
    def _has_an_address(self) -> EngineKnobs:
        if self.given and not self.url:
            raise RecipeError(
                f"url is empty, and {', '.join(self.given)} is set",
                allowed="the address of an engine, or none of its knobs",
            )
        return self

    @model_validator(mode="after")
    def _can_be_started(self) -> EngineKnobs:
        if self.dialect == "vllm":
            require_rank(self.max_rank)
        return self

    @property
    def given(self) -> list[str]:
        """The knobs that are not as they come; a run keeps every one of them, so what counts is whether it differs."""
        return [name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default]

    def require_folder(self) -> None:
        """Raise RecipeError where the engine cannot read what is trained."""
        if self.url and not self.adapters:
            raise RecipeError(
                f"adapters is empty, and the engine at {self.url!r:.200} has to read the adapter after each round",
                allowed="a folder that both can see",
                do="with luthier serve BASE --adapters DIR set rollouts.engine.adapters to DIR",
            )


class RolloutKnobs(Knobs):
    """What is sampled before each round of steps."""

    prompts: int = Field(8, ge=1, description="prompts of a rollout")
    answers: int = Field(8, ge=1, description="answers to each of them")
    max_new_tokens: int = Field(128, ge=1, description="longest answer in tokens; longer ones are cut off")
    cut: Literal["keep", "mask"] = Field(
        "keep", description="what becomes of answers that were cut off: trained like others, or not trained"
    )
    lag: int = Field(
        0, ge=0, le=1, description="rollouts that sampling runs ahead: 1 samples the next one with the weights from "
        "before the steps of this one, and corrects for it"
    )  # fmt: skip
    correction: float = Field(2.0, ge=1, description="most that a token of a lagging rollout counts for")
    redraws: int = Field(
        0, ge=0, le=32, description="attempts to replace groups whose answers were all worth the same by other prompts'"
    )
    engine: EngineKnobs = Field(
        default_factory=EngineKnobs, description="the engine that samples, where it is not this process"
    )


class ReinforceRecipe(FinetuneRecipe):
    """Reinforcement learning: one base model, prompts, a reward, one adapter."""

    offers: ClassVar[frozenset[str]] = frozenset({"rollouts"})

    recipe: Literal["reinforce"] = Field(  # type: ignore[assignment]
        "reinforce", description="which story of recipes/ this file tells"
    )
    reward: Annotated[Reward, Chosen("rewards")] | None = Field(
        None,
        description="what an answer is worth: a reward, or a list of them, lowest first, which becomes a ladder; an "
        "objective that learns from a teacher needs none",
    )
    judge: str | None = Field(None, description="run, folder or hub id of the model that judges, if one is asked")
    reward_model: str | None = Field(None, description="run of objective reward_model, if the reward is learned")
    rollouts: RolloutKnobs = Field(default_factory=RolloutKnobs, description="how answers are sampled")
    objective: Annotated[Objective, Chosen("objectives")] = Field(
        default_factory=lambda: choose("objectives", Objective, "grpo"), description="what is optimised"
    )

    @field_validator("rollouts", mode="before")
    @classmethod
    def _none_given(cls, value: object) -> object:
        return {} if value is None else value

    @field_validator("reward", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return ladder_of(value) if isinstance(value, list) else value

    @field_validator("objective", mode="after")
    @classmethod
    def _learns_from_rollouts(cls, value: Objective) -> Objective:
        if value.learner is None or "rollouts" not in value.needs:
            raise RecipeError(
                f"objective {value.method_name()} learns from rows, and recipe reinforce has none",
                allowed="an objective that learns from rollouts, such as grpo or ppo",
            )
        return value

    @model_validator(mode="after")
    def _has_a_folder_for_its_engine(self) -> ReinforceRecipe:
        self.rollouts.engine.require_folder()
        return self

    @model_validator(mode="after")
    def _names_who_is_asked(self) -> ReinforceRecipe:
        asked: dict[str, str | None] = {"judge": self.judge, "reward-model": self.reward_model}
        needs = frozenset() if self.reward is None else self.reward.needs
        reward = "there is no reward that" if self.reward is None else f"the reward {self.reward.method_name()}"
        for need, name in asked.items():
            key = need.replace("-", "_")
            if need in needs and name is None:
                raise RecipeError(
                    f"{key} is empty, and {reward} asks one",
                    allowed="a run, a folder or a hub id",
                    do=f"set {key}" + ("" if need == "judge" else " to a run with objective reward_model"),
                )
            if need not in needs and name is not None:
                raise RecipeError(
                    f"{key} is {name!r}, and {reward} asks {'one' if self.reward is None else 'none'}",
                    do=f"leave {key} out, or choose a reward that asks it",
                )
        return self

    @model_validator(mode="after")
    def _rewards_what_learns_from_it(self) -> ReinforceRecipe:
        if self.reward is None and (self.learner.rewarded or self.rollouts.redraws):
            what = "rollouts.redraws compares" if not self.learner.rewarded else (
                f"the objective {self.objective.method_name()} learns from"
            )
            raise RecipeError(
                f"reward is empty, and {what} what answers are worth",
                allowed="a reward, or a list of them, lowest first",
                do="luthier describe names them",
            )
        return self

    @model_validator(mode="after")
    def _has_answers_to_compare(self) -> ReinforceRecipe:
        if self.learner.compared and self.rollouts.answers < 2:
            raise RecipeError(
                f"rollouts.answers is {self.rollouts.answers}, and nothing can be compared with an answer that stands "
                "alone",
                allowed="at least 2, and 8 as a rule",
                do="set rollouts.answers=8, or take the objective ppo, which learns from each answer by itself",
            )
        return self

    @model_validator(mode="after")
    def _knows_its_end(self) -> ReinforceRecipe:
        if len(self.objective.meanings or ()) > 1 and self.budget.steps is None:
            raise RecipeError(
                f"budget.steps is empty, and the objective {self.objective.method_name()} has two kinds of rows, "
                "each with epochs of its own",
                allowed="a number of optimizer steps",
            )
        return self

    @model_validator(mode="after")
    def _has_prompts_for_minibatches(self) -> ReinforceRecipe:
        learner = self.learner
        if learner.minibatches > self.rollouts.prompts:
            raise RecipeError(
                f"objective.minibatches is {learner.minibatches}, and a rollout has {self.rollouts.prompts} prompts",
                allowed="at most rollouts.prompts",
            )
        if self.optimizer.steps_in_backward:
            raise RecipeError(
                f"optimizer {self.optimizer.method_name()} steps in the backward pass, where a group is in parts",
                do="set optimizer.per_layer to false",
            )
        return self

    @property
    def learner(self) -> RolloutLearner:
        """The objective, as one that learns from rollouts."""
        if self.objective.learner is None:
            raise RecipeError(f"objective {self.objective.method_name()} does not learn from rollouts")
        return self.objective.learner
