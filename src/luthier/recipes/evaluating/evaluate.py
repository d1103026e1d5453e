"""Evaluate a run's result from its files: the held-out loss of base and tuned model, computed anew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from luthier.core.errors import RecipeError
from luthier.core.knobs import validate
from luthier.data.forest import Tree
from luthier.data.prepare import Prepared, prepare
from luthier.data.tokenizer import Tokenizer
from luthier.model.files.context import context_tokens
from luthier.model.load import resolve_source
from luthier.recipes.bench import reading_of
from luthier.recipes.evaluating.rewards import evaluate_rewards
from luthier.recipes.measuring import measured
from luthier.recipes.opening.opened import open_named, require_room
from luthier.recipes.opening.places import located
from luthier.recipes.opening.purpose import bound
from luthier.recipes.opening.quantized import load_base
from luthier.recipes.opening.results import of_policy, require_one, started_in
from luthier.recipes.schemas.finetune import FinetuneRecipe
from luthier.recipes.schemas.kinds import kind_of_recipe
from luthier.recipes.schemas.reinforce import ReinforceRecipe
from luthier.recipes.sizing.accounts import held_out_trees
from luthier.recipes.teacher import reference_of
from luthier.store.runs import MODEL, RunDirectory


def evaluate_run(run: RunDirectory, *, data: Path | None = None) -> dict[str, Any]:
    """Loss and perplexity of base and tuned model on the run's held-out rows, or on another file; or rewards."""
    require_one(run)
    run = of_policy(run)
    values = run.read_recipe()
    recipe = located(validate(kind_of_recipe(values), values), started_in(run))
    if isinstance(recipe, ReinforceRecipe):
        return evaluate_rewards(run, recipe, data=data)
    opened = open_named(str(run.folder))
    prepared, trees = held_out_of(recipe, data=data, classes=opened.model.task.classes or None)
    if not trees:
        raise RecipeError(f"{run.folder} has no held-out rows", do="name a file: --data FILE")
    require_room(prepared.store.lengths, opened.model)
    objective, size = recipe.objective, recipe.batch.micro_tokens
    if (run.folder / MODEL).is_dir():
        base_model = load_base(
            recipe.model, precision=recipe.precision, device=recipe.device, seed=recipe.seed, task=opened.model.task,
            own_modules=True,
        )
        reference = reference_of(recipe, prepared, base=base_model)
        tuned = measured(opened.model, objective, trees, micro_tokens=size, reference=reference)
        base = measured(base_model, objective, trees, micro_tokens=size, reference=reference)
    else:
        reference = reference_of(recipe, prepared)
        tuned = measured(opened.model, objective, trees, micro_tokens=size, reference=reference)
        with opened.model.without_attachments():
            base = measured(opened.model, objective, trees, micro_tokens=size, reference=reference)
    return {
        "run": str(run.folder),
        "data": str(data) if data is not None else "held out",
        "rows": len({tree.row for tree in trees}),
        "trained_tokens": tuned.tokens,
        "base": base.as_dict(),
        "tuned": tuned.as_dict(),
    }


def held_out_of(
    recipe: FinetuneRecipe, *, data: Path | None = None, classes: tuple[str, ...] | None = None
) -> tuple[Prepared, list[Tree]]:
    """The data of a recipe whose paths lead from here, and its held-out trees; or another file and all its trees.

    `classes` are those of a trained model; without them they are those of the data.
    """
    tokenizer = Tokenizer.load(resolve_source(recipe.model))
    objective = bound(recipe.objective, recipe.model, tokenizer)
    prepared = prepare(
        recipe.data.train if data is None else data,
        tokenizer,
        replace(reading_of(recipe), classes=classes),
        evaluation=recipe.data.evaluation if data is None else None,
        fraction=recipe.evaluation.fraction if data is None else 0.0,
        seed=recipe.seed,
        together=recipe.evaluation.together,
        reserve=recipe.evaluation.reserve if data is None else 0.0,
        context_tokens=context_tokens(recipe.model),
    )
    if data is None:
        return prepared, held_out_trees(recipe.model_copy(update={"objective": objective}), prepared)
    views = [prepared.train[index] for index in range(len(prepared.train))]
    return prepared, [tree for view in views for tree in objective.trees(view)]
