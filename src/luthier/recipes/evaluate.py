"""Evaluate a run's result from its files: the held-out loss of base and tuned model, computed anew."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from luthier.core.errors import RecipeError
from luthier.core.knobs import validate
from luthier.data.forest import Tree, pack
from luthier.data.prepare import Prepared, prepare
from luthier.data.tokenizer import Tokenizer
from luthier.model.language_model import LanguageModel
from luthier.model.load import context_tokens, load_model, resolve_source
from luthier.objectives import Objective
from luthier.recipes.accounts import held_out_trees
from luthier.recipes.bench import reading_of
from luthier.recipes.opened import open_named, require_room
from luthier.recipes.places import located, started_in
from luthier.recipes.schema import FinetuneRecipe
from luthier.store.runs import RunDirectory
from luthier.train.result import MODEL


def evaluate_run(run: RunDirectory, *, data: Path | None = None) -> dict[str, Any]:
    """Loss and perplexity of base and tuned model on the run's held-out rows, or on another file."""
    recipe = located(validate(FinetuneRecipe, run.read_recipe()), started_in(run))
    opened = open_named(str(run.folder))
    prepared, trees = held_out_of(recipe, data=data)
    if not trees:
        raise RecipeError(f"{run.folder} has no held-out rows", do="name a file: --data FILE")
    require_room(prepared.store.lengths, opened.model)
    tuned = mean_loss(opened.model, recipe.objective, trees, micro_tokens=recipe.batch.micro_tokens)
    if (run.folder / MODEL).is_dir():
        base_model = load_model(recipe.model, precision=recipe.precision, device=recipe.device, seed=recipe.seed)
        base = mean_loss(base_model, recipe.objective, trees, micro_tokens=recipe.batch.micro_tokens)
    else:
        with opened.model.without_attachments():
            base = mean_loss(opened.model, recipe.objective, trees, micro_tokens=recipe.batch.micro_tokens)
    return {
        "run": str(run.folder),
        "data": str(data) if data is not None else "held out",
        "rows": len({tree.row for tree in trees}),
        "trained_tokens": tuned[1],
        "base": {"loss": base[0], "perplexity": math.exp(min(base[0], 700.0))},
        "tuned": {"loss": tuned[0], "perplexity": math.exp(min(tuned[0], 700.0))},
    }


def held_out_of(recipe: FinetuneRecipe, *, data: Path | None = None) -> tuple[Prepared, list[Tree]]:
    """The data of a recipe whose paths lead from here, and its held-out trees; or another file and all its trees."""
    prepared = prepare(
        recipe.data.train if data is None else data,
        Tokenizer.load(resolve_source(recipe.model)),
        reading_of(recipe),
        evaluation=recipe.data.evaluation if data is None else None,
        fraction=recipe.evaluation.fraction if data is None else 0.0,
        seed=recipe.seed,
        together=recipe.evaluation.together,
        reserve=recipe.evaluation.reserve if data is None else 0.0,
        context_tokens=context_tokens(recipe.model),
    )
    if data is None:
        return prepared, held_out_trees(recipe, prepared)
    views = [prepared.train[index] for index in range(len(prepared.train))]
    return prepared, [tree for view in views for tree in recipe.objective.trees(view)]


@torch.no_grad()
def mean_loss(
    model: LanguageModel, objective: Objective, trees: Sequence[Tree], *, micro_tokens: int = 4096
) -> tuple[float, int]:
    """The loss over all trees, divided once by their weight, and the number of tokens that carried it."""
    model.train(False)
    total = weight = 0.0
    tokens = 0
    for forest in pack(sorted(trees, key=lambda tree: -tree.token_count), max_tokens=micro_tokens):
        report = objective.loss(model.token_outputs(forest), forest)
        total += float(report.sum)
        weight += report.weight
        tokens += forest.trained_count
    return (total / weight if weight else math.nan), tokens
