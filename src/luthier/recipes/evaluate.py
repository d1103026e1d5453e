"""Evaluate a run's result from its files: the held-out loss of base and tuned model, computed anew."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from luthier.core.errors import RecipeError
from luthier.core.knobs import validate
from luthier.data.forest import Forest, Tree, pack
from luthier.data.prepare import Prepared, prepare
from luthier.data.tokenizer import Tokenizer
from luthier.model.language_model import LanguageModel
from luthier.model.load import context_tokens, resolve_source
from luthier.objectives import Objective
from luthier.recipes.accounts import held_out_trees
from luthier.recipes.bench import reading_of
from luthier.recipes.evaluate_rewards import evaluate_rewards
from luthier.recipes.kinds import kind_of_recipe
from luthier.recipes.opened import open_named, require_one, require_room
from luthier.recipes.places import located, of_policy, started_in
from luthier.recipes.purpose import bound
from luthier.recipes.quantized import load_base
from luthier.recipes.reinforce_recipe import ReinforceRecipe
from luthier.recipes.schema import FinetuneRecipe
from luthier.store.runs import RunDirectory
from luthier.train.reference import mean_log_ratio, noted
from luthier.train.result import MODEL


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
            recipe.model, precision=recipe.precision, device=recipe.device, seed=recipe.seed, task=opened.model.task
        )
        tuned = measured(opened.model, objective, trees, micro_tokens=size, reference=base_model)
        base = measured(base_model, objective, trees, micro_tokens=size)
    else:
        tuned = measured(opened.model, objective, trees, micro_tokens=size)
        with opened.model.without_attachments():
            base = measured(opened.model, objective, trees, micro_tokens=size)
    return {
        "run": str(run.folder),
        "data": str(data) if data is not None else "held out",
        "rows": len({tree.row for tree in trees}),
        "trained_tokens": tuned.tokens,
        "base": base.as_dict(),
        "tuned": tuned.as_dict(),
    }


@dataclass(frozen=True)
class Measured:
    """The loss over some trees, the number of tokens that carried it, and an objective's own metrics."""

    loss: float
    tokens: int
    metrics: Mapping[str, float]

    def as_dict(self) -> dict[str, float]:
        """As plain values; instead of a perplexity, which says nothing of classes, their metrics."""
        return {"loss": self.loss, **(self.metrics or {"perplexity": math.exp(min(self.loss, 700.0))})}


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


def mean_loss(
    model: LanguageModel,
    objective: Objective,
    trees: Sequence[Tree],
    *,
    micro_tokens: int = 4096,
    reference: LanguageModel | None = None,
) -> tuple[float, int]:
    """The loss over all trees, divided once by their weight, and the number of tokens that carried it."""
    found = measured(model, objective, trees, micro_tokens=micro_tokens, reference=reference)
    return found.loss, found.tokens


@torch.no_grad()
def measured(
    model: LanguageModel,
    objective: Objective,
    trees: Sequence[Tree],
    *,
    micro_tokens: int = 4096,
    reference: LanguageModel | None = None,
) -> Measured:
    """The loss and the metrics over all trees, each divided once by its weight, with what the objective asks for.

    A `reference` is given for a model that has no adapter which could be switched off.
    """
    model.train(False)
    heat = objective.policy_temperature
    if probes := objective.probes(trees):
        ratio = mean_log_ratio(model, _cut(probes, micro_tokens), temperature=heat, reference=reference)
        trees = objective.informed(trees, ratio)
    total = weight = 0.0
    tokens = 0
    sums: dict[str, tuple[float, float]] = {}
    for bare in _cut(trees, micro_tokens):
        forest = noted(model, bare, objective.refers, temperature=heat, reference=reference)
        report = objective.loss(model.token_outputs(forest, temperature=heat), forest)
        total += float(report.sum)
        weight += report.weight
        tokens += forest.trained_count
        for name, (one, of) in report.metrics.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + one, before[1] + of)
    metrics = {name: one / of for name, (one, of) in sums.items() if of}
    return Measured(total / weight if weight else math.nan, tokens, metrics)


def _cut(trees: Sequence[Tree], micro_tokens: int) -> list[Forest]:
    """Trees in micro-batches, as a run cuts them."""
    return pack(sorted(trees, key=lambda tree: -tree.token_count), max_tokens=micro_tokens)
