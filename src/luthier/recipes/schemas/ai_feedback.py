"""The recipe of feedback by a model: a fine-tune whose data are prompts, with a judge, and how answers are asked for.

Everything else is as in a fine-tune (schema.py). The objective decides what preferences become: a policy at once (dpo
and its kin), or a reward model, and then a policy by rollouts (ppo, grpo).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import Field, field_validator, model_validator

from luthier.core.chosen import Chosen, choose
from luthier.core.errors import RecipeError
from luthier.core.knobs import Knobs, validate
from luthier.data.rollout_learner import RolloutLearner
from luthier.objectives import Objective
from luthier.recipes.schemas.finetune import BudgetKnobs, FinetuneRecipe
from luthier.recipes.schemas.reinforce import ReinforceRecipe, RolloutKnobs
from luthier.rewards import Reward
from luthier.rewards.judge import Judge

SHARED: Final = ("model", "adapter", "quantizer", "optimizer", "schedule", "max_grad_norm", "max_bad_steps", "batch",
                 "checkpoint", "precision", "device", "seed")  # fmt: skip
"""What each stage of training takes from the recipe as it is."""


_OF_ADAPTERS: Final = ("adapters", "seen_as", "max_rank")
"""Knobs of an engine that say how it gets an adapter."""


class AnswerKnobs(Knobs):
    """What is asked of whoever answers, and how much is done between two saves."""

    pairs: int = Field(1, ge=1, description="pairs of answers to each prompt")
    temperature: float = Field(1.0, gt=0, description="of sampling; the answers of a pair have to differ")
    max_new_tokens: int = Field(128, ge=1, description="longest answer in tokens; longer ones are cut off")
    at_once: int = Field(16, ge=1, description="pairs that are answered, and then judged, between two saves")


class AiFeedbackRecipe(FinetuneRecipe):
    """Feedback by a model: one base model, prompts, a judge, one adapter."""

    offers: ClassVar[frozenset[str]] = frozenset({"rollouts"})

    recipe: Literal["ai_feedback"] = Field(  # type: ignore[assignment]
        "ai_feedback", description="which story of recipes/ this file tells"
    )
    judge: str = Field(description="who judges: run, folder or hub id of a model, or http://HOST:PORT/v1#MODEL")
    speaker: str | None = Field(None, description="who answers: run, folder or hub id; empty is the model itself")
    answers: AnswerKnobs = Field(default_factory=AnswerKnobs, description="how answers are sampled")
    verdict: Judge = Field(default_factory=lambda: Judge(scale="pair"), description="what the judge is asked")
    tie: float = Field(
        0.02, ge=0, lt=0.5, description="pairs whose probability is nearer to one half than this are not trained on"
    )
    objective: Annotated[Objective, Chosen("objectives")] = Field(
        default_factory=lambda: choose("objectives", Objective, "dpo"), description="what is optimised"
    )
    reward_budget: BudgetKnobs = Field(
        default_factory=BudgetKnobs, description="how long a reward model is trained, where the objective needs one"
    )
    reward: Annotated[Reward, Chosen("rewards")] = Field(
        default_factory=lambda: choose("rewards", Reward, "learned"), description="how a reward model's number is used"
    )
    rollouts: RolloutKnobs = Field(default_factory=RolloutKnobs, description="how rollouts are made")

    @field_validator("answers", "rollouts", "reward_budget", mode="before")
    @classmethod
    def _none_given(cls, value: object) -> object:
        return {} if value is None else value

    @field_validator("verdict", mode="before")
    @classmethod
    def _of_a_pair(cls, value: Any) -> Any:
        if value is None:
            return Judge(scale="pair")
        return {"scale": "pair", **value} if isinstance(value, dict) else value

    @field_validator("objective", mode="after")
    @classmethod
    def _takes_preferences(cls, value: Objective) -> Objective:
        if isinstance(value, RolloutLearner):
            return value
        if value.meanings != ("preference",) or not value.task(()).speaks:
            raise RecipeError(
                f"objective {value.method_name()} makes no policy of preferences",
                allowed="one that learns from pairs, such as dpo, or from rollouts, such as ppo",
            )
        return softened(value)

    @model_validator(mode="after")
    def _asks_for_pairs(self) -> AiFeedbackRecipe:
        if self.verdict.scale != "pair":
            raise RecipeError("verdict.scale is 'rating', and preferences are of pairs", allowed="scale: pair")
        if self.reward.needs != {"reward-model"}:
            raise RecipeError(
                f"reward {self.reward.method_name()} does not use the reward model that preferences become",
                allowed="learned",
            )
        return self

    @model_validator(mode="after")
    def _uses_what_is_set(self) -> AiFeedbackRecipe:
        """A key that no stage would read is refused: somebody has set it for a reason."""
        engine = self.rollouts.engine
        if self.by_rollouts:
            engine.require_folder()
            return self
        unused = [f"rollouts.{name}" for name in _differing(self.rollouts) if name != "engine"]
        unused += [f"reward_budget.{name}" for name in _differing(self.reward_budget)]
        unused += ["reward"] if self.reward != choose("rewards", Reward, "learned") else []
        # Only the base answers there, so no adapter is handed over; and where another answers, nobody is asked.
        idle = _OF_ADAPTERS if self.speaker is None else tuple(engine.given)
        unused += [f"rollouts.engine.{name}" for name in engine.given if name in idle]
        if unused:
            who = " and answers are those of speaker" if self.speaker is not None else ""
            raise RecipeError(
                f"{', '.join(unused)} is set, and nobody would read it: the objective "
                f"{self.objective.method_name()} learns from pairs{who}",
                do="leave it out, or choose an objective that learns from rollouts, such as ppo",
            )
        return self

    @property
    def by_rollouts(self) -> bool:
        """Whether preferences become a reward model first."""
        return isinstance(self.objective, RolloutLearner)


def _differing(knobs: Knobs) -> list[str]:
    """The knobs that are not as they come."""
    plain = type(knobs)()
    return [name for name in type(knobs).model_fields if getattr(knobs, name) != getattr(plain, name)]


def softened(objective: Objective) -> Objective:
    """The objective with the judge's probabilities as soft labels, where it has them and nothing else is said."""
    if "scores" not in type(objective).model_fields or "scores" in objective.model_fields_set:
        return objective
    return objective.model_copy(update={"scores": "probability"})


def reward_recipe(recipe: AiFeedbackRecipe, preferences: Path, run: Path) -> FinetuneRecipe:
    """The stage that makes a reward model of preferences."""
    objective = softened(choose("objectives", Objective, "reward_model"))
    budget = recipe.reward_budget.model_dump(exclude_none=True)
    return _on_preferences(recipe, preferences, run, objective=objective.as_recipe(), budget=budget)


def policy_recipe(recipe: AiFeedbackRecipe, preferences: Path, run: Path, reward_model: Path) -> FinetuneRecipe:
    """The last stage: a policy of preferences, or of the `reward_model` that they became."""
    objective, budget = recipe.objective.as_recipe(), recipe.budget.model_dump(exclude_none=True)
    if not recipe.by_rollouts:
        return _on_preferences(recipe, preferences, run, objective=objective, budget=budget)
    # Held-out data are preferences; of prompts a share is held out.
    data = recipe.data.model_dump(exclude_none=True, exclude={"evaluation"})
    rolled = {
        **_shared(recipe), "recipe": "reinforce", "data": data, "objective": objective, "budget": budget,
        "reward": recipe.reward.as_recipe(), "reward_model": str(reward_model),
        "rollouts": recipe.rollouts.model_dump(), "evaluation": recipe.evaluation.model_dump(), "run": str(run),
    }  # fmt: skip
    return validate(ReinforceRecipe, rolled)


def _on_preferences(recipe: AiFeedbackRecipe, preferences: Path, run: Path, **own: Any) -> FinetuneRecipe:
    kept = ("template", "max_tokens", "over_length", "date", "evaluation")
    data = recipe.data.model_dump(exclude_none=True, include=set(kept))
    held_out = {**recipe.evaluation.model_dump(), "together": "prompts"}
    data |= {"train": str(preferences)}
    return validate(
        FinetuneRecipe, {**_shared(recipe), "data": data, "evaluation": held_out, "run": str(run), **own}
    )


def _shared(recipe: AiFeedbackRecipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", exclude_none=True, include=set(SHARED))
