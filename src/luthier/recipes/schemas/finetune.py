"""The recipe of a fine-tune: every knob, with its range and its meaning.

One schema serves the YAML file, `--set`, `luthier init`, the help and the Python call. A method's own knobs live in the
method's file; what is here belongs to the run.
"""

from __future__ import annotations

import datetime
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from luthier.adapters import Adapter
from luthier.core.chosen import Chosen, choose
from luthier.core.errors import RecipeError
from luthier.core.knobs import Knobs
from luthier.objectives import Objective
from luthier.optimizers import Optimizer
from luthier.quantizers import Quantizer
from luthier.recipes.schemas.offload import Offload, require_recomputed
from luthier.schedules import Schedule
from luthier.train.in_backward import cut, require_no_clipping

Paths = str | Annotated[tuple[str, ...], Field(strict=False)]
DEFAULT_STEP_TOKENS = 8192


class DataKnobs(Knobs):
    """Where the rows come from and how they become tokens."""

    train: Paths = Field(description="data file, folder, glob or a list of them; FILE#500 takes the first 500 rows")
    evaluation: Paths | None = Field(None, description="held-out data; empty splits a fraction off the training rows")
    format: str | None = Field(None, description="data format; empty detects it and says what it found")
    columns: dict[str, str] | None = Field(
        None, description="column names for prompt and answer (and system), or for text, where detection cannot know"
    )
    template: str = Field("auto", description="chat template: auto (the model's own), a shipped name, or a .jinja file")
    train_on: Literal["answers", "last", "all"] = Field("answers", description="which turns carry loss")
    max_tokens: int | None = Field(None, ge=16, description="longest row in tokens; empty takes the model's own limit")
    over_length: Literal["raise", "drop", "truncate"] = Field(
        "raise", description="what happens to longer rows; always counted"
    )
    on_bad_row: Literal["raise", "skip"] = Field("raise", description="what happens to rows that cannot be read")
    date: str | None = Field(None, description="day that dated chat templates show; empty is the day the run begins")

    @field_validator("date", mode="before")
    @classmethod
    def _a_day(cls, value: object) -> object:
        if isinstance(value, datetime.date):  # as YAML reads it where it is not quoted
            return value.isoformat()
        try:
            return value if value is None else datetime.date.fromisoformat(str(value)).isoformat()
        except ValueError:
            raise RecipeError(f"data.date: {value!r}", allowed="a day such as 2026-11-21") from None


class BudgetKnobs(Knobs):
    """How long a run is. The first limit that is reached ends it."""

    epochs: float | None = Field(
        None, gt=0, le=100_000, description="passes over the data; 3 when nothing else is given"
    )
    steps: int | None = Field(None, ge=1, description="optimizer steps")
    minutes: float | None = Field(None, gt=0, description="minutes of training")


class BatchKnobs(Knobs):
    """How much one optimizer step sees, and how much goes through the model at once."""

    tokens: int | None = Field(None, ge=1, description="tokens of one optimizer step; 8192 when rows is empty too")
    rows: int | None = Field(None, ge=1, description="rows of one optimizer step, instead of tokens")
    micro_tokens: int = Field(4096, ge=16, description="tokens that go through the model at once; changes no result")
    recompute: Literal["auto", "none", "all"] | Annotated[int, Field(ge=0)] = Field(
        "auto",
        description="blocks whose inside is made again in the backward pass instead of kept, the first so many; "
        "auto takes as few as memory allows; changes no result",
    )
    offload: Offload = Field(
        "none",
        description="what lies in the host's memory while a GPU trains: optimizer (with masters and gradients; the "
        "host steps), activations (inputs of recomputed blocks) or both",
    )

    @model_validator(mode="after")
    def _one_measure(self) -> BatchKnobs:
        if self.tokens is not None and self.rows is not None:
            raise RecipeError("batch has both tokens and rows", allowed="one of the two")
        return self

    @model_validator(mode="after")
    def _keeps_what_it_moves(self) -> BatchKnobs:
        require_recomputed(self.offload, self.recompute, within="batch.")
        return self


class EvaluationKnobs(Knobs):
    """What is held out, how often it is looked at, and what the model is asked meanwhile."""

    fraction: float = Field(0.05, ge=0, lt=1, description="share of the rows that is held out; 0 evaluates nothing")
    reserve: float = Field(
        0.0, ge=0, lt=1, description="share of the rows neither trained nor held out: another run is judged by it"
    )
    together: Literal["copies", "prompts"] = Field(
        "copies", description="what is never split: copies of a row, or all rows with one and the same prompt"
    )
    every: int = Field(50, ge=0, description="optimizer steps between evaluations; 0 only at the end")
    max_rows: int = Field(200, ge=1, description="held-out rows that are evaluated at most")
    prompts: int = Field(3, ge=0, description="held-out prompts that base and tuned model answer at each evaluation")
    max_new_tokens: int = Field(64, ge=1, description="longest of these answers, in tokens")
    patience: int = Field(0, ge=0, description="evaluations without gain before the run stops early; 0 never")


class CheckpointKnobs(Knobs):
    """When the state is saved and how many states are kept."""

    every: int = Field(100, ge=0, description="optimizer steps between checkpoints; 0 only at the end")
    keep: int = Field(2, ge=1, description="checkpoints kept besides the best and the last")


class ReferenceKnobs(Knobs):
    """Whose word the objective asks for: that of the base, of a teacher, or of the base with a prompt."""

    model: str | None = Field(None, description="run, folder or hub id of a teacher; empty is the base model itself")
    prompt: str = Field("", description="system message that the teacher reads and the student does not")
    cache: bool = Field(
        False, description="whether all rows are asked about once, before the first step, instead of in every step; "
        "what is said is kept in the run directory"
    )  # fmt: skip

    @property
    def teaches(self) -> bool:
        """Whether it is another's word than the base's."""
        return self.model is not None or bool(self.prompt)


def require_trainable(adapter: Adapter, quantizer: Quantizer) -> None:
    """Raise RecipeError for an adapter that trains the weights which a quantizer packs."""
    if "trains-base" in adapter.provides and "packed-weights" in quantizer.provides:
        packs, trains = quantizer.method_name(), adapter.method_name()
        raise RecipeError(
            f"adapter {trains} trains the weights that quantizer {packs} would freeze in a few bits",
            allowed="adapters beside the weights, such as lora; or quantizer none",
        )


class FinetuneRecipe(Knobs):
    """A fine-tune: one base model, one data set, one adapter, one objective."""

    offers: ClassVar[frozenset[str]] = frozenset()
    """What objectives may require beside the data."""

    recipe: Literal["finetune"] = Field("finetune", description="which story of recipes/ this file tells")
    model: str = Field(description="base model: hub id, folder, seedling, or fresh:FOLDER for new weights")
    data: DataKnobs = Field(description="where the rows come from")
    adapter: Annotated[Adapter, Chosen("adapters")] = Field(
        default_factory=lambda: choose("adapters", Adapter, "lora"), description="what is trained"
    )
    quantizer: Annotated[Quantizer, Chosen("quantizers")] = Field(
        default_factory=lambda: choose("quantizers", Quantizer, "none"), description="how the frozen weights are kept"
    )
    objective: Annotated[Objective, Chosen("objectives")] = Field(
        default_factory=lambda: choose("objectives", Objective, "sft"), description="what is optimised"
    )
    reference: ReferenceKnobs = Field(
        default_factory=lambda: ReferenceKnobs(), description="whose word the objective asks for, if it asks for any"
    )
    optimizer: Annotated[Optimizer, Chosen("optimizers")] = Field(
        default_factory=lambda: choose("optimizers", Optimizer, "adamw"), description="how a gradient becomes a step"
    )
    schedule: Annotated[Schedule, Chosen("schedules")] = Field(
        default_factory=lambda: choose("schedules", Schedule, "cosine"), description="learning rate over the run"
    )
    max_grad_norm: float | None = Field(1.0, gt=0, description="gradients are scaled down to this norm; empty never")
    max_bad_steps: int = Field(3, ge=1, description="steps in a row whose loss or gradient is not finite before a stop")
    budget: BudgetKnobs = Field(default_factory=BudgetKnobs, description="how long the run is")
    batch: BatchKnobs = Field(default_factory=BatchKnobs, description="how much a step sees")
    evaluation: EvaluationKnobs = Field(default_factory=EvaluationKnobs, description="what is held out and asked")
    checkpoint: CheckpointKnobs = Field(default_factory=CheckpointKnobs, description="what is kept")
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="dtype of weights and products")
    device: str = Field("auto", description="cpu, cuda, cuda:1, ...; auto takes a GPU when there is one")
    seed: int = Field(0, ge=0, description="of initial adapter weights, row order, dropout and the held-out split")
    run: str | None = Field(None, description="run directory; empty is runs/<date>-<name>")

    @field_validator("data", mode="before")
    @classmethod
    def _bare_path(cls, value: object) -> object:
        return {"train": value} if isinstance(value, (str, list, tuple)) else value

    @field_validator("budget", "batch", "evaluation", "checkpoint", "reference", mode="before")
    @classmethod
    def _nothing_given(cls, value: object) -> object:
        # What is left of a section once all of its lines are commented out, as `luthier init` writes it.
        return {} if value is None else value

    @model_validator(mode="after")
    def _trains_what_is_there(self) -> FinetuneRecipe:
        require_trainable(self.adapter, self.quantizer)
        return self

    @model_validator(mode="after")
    def _asks_whom_it_needs(self) -> FinetuneRecipe:
        objective, own = self.objective, self.reference
        name = objective.method_name()
        if objective.taught and not own.teaches:
            raise RecipeError(
                f"reference.model and reference.prompt are empty, and the objective {name} learns from a teacher",
                allowed="a run, a folder or a hub id; or a prompt, for the base model itself with that prompt",
            )
        if own.teaches and not objective.taught:
            key, value = ("prompt", own.prompt) if own.model is None else ("model", own.model)
            raise RecipeError(
                f"reference.{key} is {value!r}, and the objective {name} learns from no teacher",
                do=f"leave reference.{key} out, or choose an objective that has a teacher",
            )
        if own.cache and (not objective.reference or "rollouts" in objective.needs):
            why = "has no reference" if not objective.reference else "learns from answers that are new in every step"
            raise RecipeError(
                f"reference.cache is true, and the objective {name} {why}",
                allowed="true for objectives of rows with a reference, such as dpo and kto",
            )
        return self

    @model_validator(mode="after")
    def _steps_at_once(self) -> FinetuneRecipe:
        if self.optimizer.steps_in_backward:
            require_no_clipping(self.optimizer, self.max_grad_norm)
            tokens = self.batch.tokens or DEFAULT_STEP_TOKENS
            if self.batch.rows is None and tokens > self.batch.micro_tokens:
                raise cut(tokens, self.batch.micro_tokens)
        return self

    @field_validator("objective", mode="after")
    @classmethod
    def _composes(cls, value: Objective) -> Objective:
        if lacking := value.needs - cls.offers:
            recipe = " or a recipe: reinforce" if "rollouts" in lacking else ""
            raise RecipeError(
                f"objective {value.method_name()} needs {', '.join(sorted(lacking))}",
                allowed=f"objectives that need nothing but the data{recipe}",
            )
        return value
