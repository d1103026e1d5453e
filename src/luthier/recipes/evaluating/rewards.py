"""Evaluate a run of reinforcement learning from its files: what answers of base and tuned model are worth, anew.

Held-out prompts are answered greedily and scored by the reward of the run with its judge, reward model or sandbox, as
the run itself evaluates; the rows may also be those of another file with the columns that the reward reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from luthier.core.errors import RecipeError
from luthier.data.prepare import Prepared, prepare
from luthier.data.tokenizer import Tokenizer
from luthier.model.files.context import context_tokens
from luthier.model.language_model import LanguageModel
from luthier.model.load import resolve_source
from luthier.recipes.bench import reading_of
from luthier.recipes.opening.opened import open_named
from luthier.recipes.opening.quantized import load_base
from luthier.recipes.reinforcing.reinforce import HeldOut
from luthier.recipes.reinforcing.tools import scoring_of
from luthier.recipes.schemas.reinforce import ReinforceRecipe
from luthier.recipes.teacher import reference_of
from luthier.store.runs import MODEL, RunDirectory


def evaluate_rewards(run: RunDirectory, recipe: ReinforceRecipe, *, data: Path | None = None) -> dict[str, Any]:
    """The reward and its parts of base and tuned model; `recipe` is the run's, with paths that lead from here."""
    if data is not None:
        # Every row of the file is a prompt, as a run would read it.
        knobs = recipe.data.model_copy(update={"train": str(data), "evaluation": None})
        recipe = recipe.model_copy(update={"data": knobs})
    prepared = prompts_of(recipe, whole=data is not None)
    opened, scoring = open_named(str(run.folder)), scoring_of(recipe)
    views = prepared.held_out if data is None else prepared.train
    held = HeldOut.of(recipe, prepared, reading_of(recipe), opened.tokenizer, opened.model, scoring=scoring,
                      reference=reference_of(recipe, prepared), views=views)  # fmt: skip
    if not held.prompts:
        raise RecipeError(f"{run.folder} has no held-out prompts", do="name a file: --data FILE")
    tuned = _worth(held)
    if (run.folder / MODEL).is_dir():
        base = _worth(held.by(_base(recipe, opened.model)))
    else:
        with opened.model.without_attachments():
            base = _worth(held)
    count = len(held.prompts)
    return {
        "run": str(run.folder),
        "data": str(data) if data is not None else "held out",
        "prompts": count,
        "not_scored": {"base": count - base.pop("scored"), "tuned": count - tuned.pop("scored")},
        "base": base,
        "tuned": tuned,
    }


def _worth(held: HeldOut) -> dict[str, Any]:
    """The mean of the reward, of each part and of the length, over the answers that could be scored."""
    report = held.measured()
    if not report.weight:
        raise RecipeError("no answer could be scored", allowed="at least one", do="see what the reward needs")
    return {**{name: total / count for name, (total, count) in report.metrics.items()}, "scored": int(report.weight)}


def _base(recipe: ReinforceRecipe, tuned: LanguageModel) -> LanguageModel:
    return load_base(recipe.model, precision=recipe.precision, device=recipe.device, seed=recipe.seed, task=tuned.task,
                     own_modules=True)  # fmt: skip


def prompts_of(recipe: ReinforceRecipe, *, whole: bool = False) -> Prepared:
    """The prompts of a run, whose recipe's paths lead from here; with `whole` every row is one to train on."""
    return prepare(
        recipe.data.train,
        Tokenizer.load(resolve_source(recipe.model)),
        reading_of(recipe),
        evaluation=recipe.data.evaluation,
        fraction=0.0 if whole else recipe.evaluation.fraction,
        seed=recipe.seed,
        together=recipe.evaluation.together,
        reserve=0.0 if whole else recipe.evaluation.reserve,
        context_tokens=context_tokens(recipe.model),
    )
