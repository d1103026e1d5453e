"""The bench before the first step: data checked and tokenised, the base loaded, the adapter on, the plan made.

What `--dry-run` shows is laid out here, and so is what a run trains: there is one way to set up a fine-tune.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from luthier.data.prepare import Prepared, Reading, prepare
from luthier.data.tokenizer import Tokenizer
from luthier.kernels.pool import bound_caches
from luthier.model.attachment import Attachment
from luthier.model.language_model import LanguageModel
from luthier.model.load import context_tokens, load_model, resolve_source
from luthier.recipes import accounts
from luthier.recipes.control_tokens import control_tokens, require_rows, with_token_ids
from luthier.recipes.memory import PARTS, use_pool
from luthier.recipes.opened import require_room
from luthier.recipes.places import located
from luthier.recipes.quantized import quantize
from luthier.recipes.schema import DEFAULT_STEP_TOKENS, FinetuneRecipe
from luthier.train.source import DataSource
from luthier.train.stepper import Stepper


@dataclass(frozen=True)
class Bench:
    """Everything on the table before the first step; `pooled` is whether CPU tensors come from the pool."""

    recipe: FinetuneRecipe
    tokenizer: Tokenizer
    data: Prepared
    model: LanguageModel
    attachment: Attachment
    stepper: Stepper
    source: DataSource
    plan: dict[str, Any]
    pooled: bool


def lay_out(recipe: FinetuneRecipe, folder: Path | None = None) -> Bench:
    """Check the data and build everything a run needs, without training; what `--dry-run` shows comes from here.

    `folder` is where the relative paths of the recipe start, when that is not here.
    """
    bound_caches()
    found = located(recipe, folder)
    tokenizer = Tokenizer.load(resolve_source(found.model))
    data = prepare(
        found.data.train,
        tokenizer,
        reading_of(found),
        evaluation=found.data.evaluation,
        fraction=recipe.evaluation.fraction,
        seed=recipe.seed,
        together=recipe.evaluation.together,
        reserve=recipe.evaluation.reserve,
        context_tokens=context_tokens(found.model),
    )
    model = load_model(found.model, precision=recipe.precision, device=recipe.device, seed=recipe.seed)
    quantize(model, recipe.quantizer)
    # The result names its base as the recipe does, wherever the run is resumed from.
    model.source = recipe.model
    require_rows(model, tokenizer, data.store)
    # From here on the recipe names tokens by id: whoever reads an adapter's knobs has no tokenizer.
    recipe = recipe.model_copy(update={"adapter": with_token_ids(recipe.adapter, tokenizer, data.store.stop_ids)})
    # One seed for the adapter's first weights and the dropout that follows; the row order has its own generator.
    torch.manual_seed(recipe.seed)
    attachment = model.attach(recipe.adapter.attach(model.sites))
    require_room(data.store.lengths, model)
    stepper = Stepper(
        model,
        attachment,
        recipe.objective,
        recipe.optimizer,
        max_grad_norm=recipe.max_grad_norm,
        micro_tokens=recipe.batch.micro_tokens,
    )
    rows, tokens = recipe.batch.rows, recipe.batch.tokens
    source = DataSource(
        data.train,
        recipe.objective,
        lengths=data.train.lengths,
        seed=recipe.seed,
        rows=rows,
        tokens=tokens if rows or tokens else DEFAULT_STEP_TOKENS,
    )
    unpooled = use_pool(model)
    plan = accounts.plan(recipe, data, model, attachment, source, pooled=not unpooled)
    if unpooled and model.device.type == "cpu":
        plan["notices"].append(f"memory: tensors are taken from the heap, which falls into pieces ({unpooled})")
    model.recompute(plan["memory"]["recomputed"])
    stepper.planned_bytes = {name: plan["memory"][name] for name in PARTS}
    plan["special_tokens"], notices = control_tokens(model, tokenizer, data.store, recipe.adapter)
    plan["notices"] = [*notices, *plan["notices"]]
    return Bench(recipe, tokenizer, data, model, attachment, stepper, source, plan, not unpooled)


def reading_of(recipe: FinetuneRecipe) -> Reading:
    """How the recipe wants its rows to become tokens."""
    data = recipe.data
    return Reading(
        format=data.format,
        columns=data.columns,
        template=data.template,
        train_on=data.train_on,
        max_tokens=data.max_tokens,
        over_length=data.over_length,
        on_bad_row=data.on_bad_row,
        now=data.date,
    )
