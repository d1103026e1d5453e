"""The bench before the first step: data checked and tokenised, the base loaded, the adapter on, the plan made.

What `--dry-run` shows is laid out here, and so is what a run trains: there is one way to set up a fine-tune.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from luthier.core.errors import RecipeError
from luthier.data.prepare import Prepared, Reading, prepare
from luthier.data.tokenizer import Tokenizer
from luthier.data.training_rows import TrainingRows
from luthier.kernels.lanes import Lane
from luthier.kernels.pool import bound_caches
from luthier.model.editing.attachment import Attachment
from luthier.model.files.context import context_tokens
from luthier.model.language_model import LanguageModel
from luthier.model.load import resolve_source
from luthier.model.running.graphs import Graphs
from luthier.model.tasks import CAUSAL, Task
from luthier.recipes.control_tokens import control_tokens, require_rows, with_token_ids
from luthier.recipes.graphed import recorded
from luthier.recipes.opening.opened import require_room
from luthier.recipes.opening.places import located
from luthier.recipes.opening.purpose import bound, edits_for, read_for
from luthier.recipes.opening.quantized import load_base, quantize
from luthier.recipes.schemas.finetune import DEFAULT_STEP_TOKENS, FinetuneRecipe
from luthier.recipes.schemas.offload import inputs_are_far, lane_to_host, optimizer_is_far
from luthier.recipes.schemas.reinforce import ReinforceRecipe
from luthier.recipes.sizing import accounts
from luthier.recipes.sizing.memory import PARTS, use_pool
from luthier.recipes.teacher import reference_of
from luthier.train.batcher import Batcher
from luthier.train.in_backward import cut
from luthier.train.pass_report import PassReport
from luthier.train.source import DataSource, Source
from luthier.train.stepper import Stepper

if TYPE_CHECKING:
    from luthier.recipes.reinforcing.reinforce import HeldOut


@dataclass(frozen=True)
class Bench:
    """Everything on the table before the first step; `pooled` is whether CPU tensors come from the pool.

    `planned` are the rows of the `source`, or, where it makes them itself, as large ones as it can make. What is held
    out may be `rewarded`, where it has no loss. Where passes are recorded, `graphs` has them.
    """

    recipe: FinetuneRecipe
    tokenizer: Tokenizer
    data: Prepared
    model: LanguageModel
    attachment: Attachment
    stepper: Stepper
    source: Source
    plan: dict[str, Any]
    pooled: bool
    planned: DataSource
    rewarded: Callable[[], PassReport] | None = None
    graphs: Graphs | None = None


def lay_out(
    recipe: FinetuneRecipe, folder: Path | None = None, *, name: str = "", beside: Sequence[Bench] = ()
) -> Bench:
    """Check the data and build everything a run needs, without training; what `--dry-run` shows comes from here.

    `folder` is where the relative paths of the recipe start, when that is not here. With a `name` it is one of several
    adapters that are trained on one base: that of the benches that are laid out already.
    """
    bound_caches()
    found = located(recipe, folder)
    tokenizer = Tokenizer.load(resolve_source(found.model))
    # From here on the recipe names tokens by id: whoever reads an objective's or an adapter's knobs has no tokenizer.
    objective = bound(found.objective, found.model, tokenizer)
    recipe = recipe.model_copy(update={"objective": objective})
    data = _prepared(found, tokenizer)
    task = objective.task(data.classes)
    remarks = objective.remarks(TrainingRows(data.train, data.report.where, recipe.batch.rows))
    if name:
        _require_one_of_several(name, task, recipe)
    model = beside[0].model if beside else _base(recipe, found, task)
    batcher = beside[0].stepper.batcher if beside else Batcher(model, micro_tokens=recipe.batch.micro_tokens)
    require_rows(model, tokenizer, data.store)
    recipe = recipe.model_copy(update={"adapter": with_token_ids(recipe.adapter, tokenizer, data.store.stop_ids)})
    # One seed for the adapter's first weights and the dropout that follows; the row order has its own generator.
    torch.manual_seed(recipe.seed)
    attachment = model.attach(edits_for(recipe.adapter, recipe.objective, model), name=name or "default")
    lane = lane_to_host(recipe.batch.offload, model)
    stepper = Stepper(
        model, attachment, recipe.objective, recipe.optimizer, max_grad_norm=recipe.max_grad_norm,
        micro_tokens=recipe.batch.micro_tokens, batcher=batcher if name else None,
        lane=lane if optimizer_is_far(recipe.batch.offload) else None,
    )  # fmt: skip
    source, planned, rewarded = _sources(recipe, found, data, tokenizer, stepper, attachment)
    unpooled = use_pool(model)
    with model.only(attachment.name):
        require_room(data.store.lengths, model)
        plan = accounts.plan(recipe, data, model, attachment, planned, pooled=not unpooled)
        plan["special_tokens"], notices = control_tokens(model, tokenizer, data.store, recipe.adapter)
    if unpooled and model.device.type == "cpu":
        plan["notices"].append(f"memory: tensors are taken from the heap, which falls into pieces ({unpooled})")
    _recompute(model, recipe, [plan, *(bench.plan for bench in beside)], lane)
    stepper.planned_bytes = {part: plan["memory"][part] for part in PARTS}
    plan["notices"] = [*notices, *remarks, *recipe.adapter.remarks(model.sites), *plan["notices"]]
    return Bench(
        recipe, tokenizer, data, model, attachment, stepper, source, plan, not unpooled, planned, rewarded,
        recorded(model, recipe.batch.micro_tokens, alone=not name),
    )  # fmt: skip


def _prepared(found: FinetuneRecipe, tokenizer: Tokenizer) -> Prepared:
    """The rows of a recipe as tokens, checked and split."""
    held_out = found.evaluation
    return prepare(
        found.data.train,
        tokenizer,
        reading_of(found),
        evaluation=found.data.evaluation,
        fraction=held_out.fraction,
        seed=found.seed,
        together=held_out.together,
        reserve=held_out.reserve,
        context_tokens=context_tokens(found.model),
    )


def _recompute(
    model: LanguageModel, recipe: FinetuneRecipe, plans: Sequence[Mapping[str, Any]], lane: Lane | None
) -> None:
    """As many blocks as one of the plans says: it changes no result, so one number serves all."""
    again = max(plan["memory"]["recomputed"] for plan in plans)
    model.recompute(again, lane=lane if inputs_are_far(recipe.batch.offload) else None)


def _sources(
    recipe: FinetuneRecipe,
    found: FinetuneRecipe,
    data: Prepared,
    tokenizer: Tokenizer,
    stepper: Stepper,
    attachment: Attachment,
) -> tuple[Source, DataSource, Callable[[], PassReport] | None]:
    """Where steps come from, the rows they are planned by, and how what is held out is rewarded, where it is."""
    # What the base was is not asked here: it is the model with its adapter switched off.
    stepper.batcher.reference = reference_of(found, data)
    if not isinstance(recipe, ReinforceRecipe):
        rows = _source(recipe, data)
        return rows, rows, None
    # Rewards, sandboxes and engines elsewhere: a run that reads its rows has no use for them.
    from luthier.recipes.reinforcing import reinforce
    from luthier.recipes.reinforcing.tools import scoring_of

    asked: dict[str, Any] = {}
    if isinstance(found, ReinforceRecipe):
        asked = {"judge": found.judge, "reward_model": found.reward_model, "rollouts": found.rollouts}
    here = recipe.model_copy(update={"data": found.data, **asked})
    reading, scoring = reading_of(found), scoring_of(here)
    source = reinforce.rollout_source(here, data, reading, tokenizer, stepper, attachment, scoring=scoring)
    held = reinforce.HeldOut.of(
        here, data, reading, tokenizer, stepper.model, scoring=scoring,
        reference=stepper.batcher.reference,
    )
    return source, reinforce.stand_in(here, data), _rewards(held, attachment.name) if held.prompts else None


def _rewards(held: HeldOut, name: str) -> Callable[[], PassReport]:
    def rewarded() -> PassReport:
        with held.model.only(name):
            return held.measured()

    return rewarded


def _require_one_of_several(name: str, task: Task, recipe: FinetuneRecipe) -> None:
    """Raise RecipeError for an adapter that has to be trained alone."""
    taught = recipe.objective.taught
    if task != CAUSAL or recipe.adapter.first_look or taught or recipe.reference.cache:
        what = "looks at rows before it trains" if task == CAUSAL else f"is for {task.name}"
        what = "keeps what its reference says" if recipe.reference.cache else what
        what = "learns from a teacher" if taught else what
        raise RecipeError(
            f"the adapter {name!r} {what}, and it is one of several",
            allowed="objectives that go on with a text, and adapters that need no look at the data",
            do="train it in a run of its own",
        )


def _source(recipe: FinetuneRecipe, data: Prepared) -> DataSource:
    """Where the rows of each step come from. Raises RecipeError where a step is too large for the optimizer."""
    rows, tokens = recipe.batch.rows, recipe.batch.tokens
    source = DataSource(
        data.train,
        recipe.objective,
        lengths=data.train.lengths,
        seed=recipe.seed,
        rows=rows,
        tokens=tokens if rows or tokens else DEFAULT_STEP_TOKENS,
    )
    if recipe.optimizer.steps_in_backward and (most := source.largest_step()) > recipe.batch.micro_tokens:
        raise cut(most, recipe.batch.micro_tokens)
    return source


def _base(recipe: FinetuneRecipe, found: FinetuneRecipe, task: Task) -> LanguageModel:
    """The base model of a recipe for a task; `found` is the same with paths that lead from here."""
    model = load_base(
        found.model, precision=recipe.precision, device=recipe.device, seed=recipe.seed, task=task, own_modules=True
    )
    quantize(model, recipe.quantizer)
    # The result names its base as the recipe does, wherever the run is resumed from.
    model.source = recipe.model
    return model


def reading_of(recipe: FinetuneRecipe) -> Reading:
    """How the recipe wants its rows to become tokens."""
    data = recipe.data
    reading = Reading(
        format=data.format,
        columns=data.columns,
        template=data.template,
        train_on=data.train_on,
        max_tokens=data.max_tokens,
        over_length=data.over_length,
        on_bad_row=data.on_bad_row,
        now=data.date,
    )
    return read_for(reading, recipe.objective, recipe.model)
