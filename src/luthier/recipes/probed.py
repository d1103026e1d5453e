"""What a probe looks at: a run or two folders, opened as a pair of models with texts to ask them about.

Read top to bottom: open the tuned model and its base, find what changed, gather the rows that were held out, the texts
that should have been kept, and where gradients come from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from luthier.adapters import saved_adapter
from luthier.core.errors import DataError, RecipeError
from luthier.core.events import Event, Recorder
from luthier.core.knobs import validate
from luthier.core.paths import cache_folder
from luthier.data.forest import Ints, Tree, pack
from luthier.data.prepare import Prepared, Reading, prepare
from luthier.model.adapter_files import CONFIG
from luthier.model.base_spectra import FOLDER, BaseSpectra
from luthier.model.language_model import LanguageModel
from luthier.model.pair import Gradients, Pair, Text, pair_of_adapter, pair_of_models
from luthier.model.sources import SEEDLING
from luthier.objectives import Objective
from luthier.objectives.language_model import LanguageModelling
from luthier.objectives.sft import SFT
from luthier.recipes.compared import kept_trees
from luthier.recipes.demo import grown_on
from luthier.recipes.evaluate import held_out_of
from luthier.recipes.measuring import mean_loss
from luthier.recipes.opened import Opened, kept_precision, open_named, read_extras
from luthier.recipes.places import located, started_in
from luthier.recipes.quantized import load_base
from luthier.recipes.schema import DEFAULT_STEP_TOKENS, FinetuneRecipe
from luthier.recipes.teacher import reference_of
from luthier.store.runs import RunDirectory, is_run
from luthier.train.reference import ITSELF, Reference, noted
from luthier.train.result import ADAPTER, MODEL

PLAIN = (".txt", ".md")
"""Endings of kept files that are one text each; others are rows."""
MOST_TREES = 400
"""Rows of a text that are asked about at most."""
MICRO_ROWS = 4
TOLD_EVERY = 5.0
"""Seconds between two lines of progress."""


@dataclass(frozen=True)
class Probed:
    """A pair and where it came from: the names of both sides, the tuned model, and the folder of an adapter."""

    pair: Pair
    before: str
    after: str
    opened: Opened
    adapter: Path | None

    @property
    def apart(self) -> bool:
        """Whether the change lies apart from the weights, in an adapter."""
        return self.adapter is not None


def probed_run(run: RunDirectory, keep: Sequence[str] = (), *, recorder: Recorder) -> Probed:
    """The pair of a run's base and result. Raises RecipeError for a run without a result."""
    opened = open_named(str(run.folder))
    recipe = _recipe_of(run)
    base = None
    if (run.folder / MODEL).is_dir():
        if recipe is None:
            raise RecipeError(f"{run.folder} is no fine-tune, and its base is not known",
                              do="name both models: --before DIR --after DIR")  # fmt: skip
        precision = kept_precision(read_extras(run.folder / MODEL), recipe.precision)
        base = load_base(recipe.model, precision=precision, device=recipe.device, task=opened.model.task)
    source = recipe.model if recipe is not None else opened.model.source
    texts, samples, gradients = [], [], None
    if recipe is not None:
        prepared, trees = held_out_of(recipe, classes=opened.model.task.classes or None)
        told = reference_of(recipe, prepared, base=base)
        if trees:
            texts.append(_text("held-out rows", "task", recipe.objective, trees, told))
            samples += [_first_path(tree) for tree in trees[:MOST_TREES]]
        gradients = _gradients(opened.model, recipe, prepared, told)
    settings = recipe.adapter.as_recipe() if recipe is not None else {}
    more = _more(opened, keep, source, texts, samples, recorder)
    pair = (pair_of_adapter(opened.model, settings=settings, gradients=gradients, **more) if base is None
            else pair_of_models(base, opened.model, settings=settings, gradients=gradients, **more))  # fmt: skip
    return Probed(pair, source, str(run.folder), opened, run.folder / ADAPTER if base is None else None)


def probed_folders(before: str, after: str, keep: Sequence[str] = (), *, recorder: Recorder) -> Probed:
    """The pair of two models, or of a model and an adapter for it, by their folders or ids."""
    if is_run(Path(after)) or is_run(Path(before)):
        raise RecipeError(f"{before} and {after}: one of them is a run, which knows its own base",
                          do="luthier probe RUN")  # fmt: skip
    adapter = Path(after) if (Path(after) / CONFIG).is_file() else None
    # In float32: what rounding to fewer bits would change is no finding.
    settings: Mapping[str, Any] = {}
    if adapter is not None:
        opened = open_named(before, adapter=after, precision="float32")
        settings = saved_adapter(adapter, opened.model.sites).as_recipe()
        pair = pair_of_adapter(opened.model, settings=settings, **_more(opened, keep, before, [], [], recorder))
        return Probed(pair, before, after, opened, adapter)
    opened = open_named(after, precision="float32")
    base = load_base(before, precision="float32", task=opened.model.task)
    pair = pair_of_models(base, opened.model, **_more(opened, keep, before, [], [], recorder))
    if not any(change.linear for change in pair.changes):
        raise RecipeError(
            f"{before} and {after} have no layer of one name and shape",
            allowed="two models of one architecture",
            do="name a model and what was tuned from it",
        )
    return Probed(pair, before, after, opened, None)


def _more(
    opened: Opened, keep: Sequence[str], source: str, texts: list[Text], samples: list[Ints], recorder: Recorder
) -> dict[str, Any]:
    """Texts and samples with those that should have been kept, the cache, and progress."""
    opened = _cutting(opened)
    for file in keep:
        text, trees = _kept(opened, file)
        texts.append(text)
        samples += [_first_path(tree) for tree in trees]
    if source == SEEDLING and opened.model.task.speaks:
        trees = grown_on(opened)[:MOST_TREES]
        texts.append(_text("the seedling's own kind of text", "kept", LanguageModelling(), trees))
        samples = samples or [_first_path(tree) for tree in trees]
    spectra = BaseSpectra(cache_folder() / FOLDER)
    return {"texts": tuple(texts), "samples": tuple(samples), "spectra": spectra, "tell": teller(recorder)}


def _cutting(opened: Opened) -> Opened:
    """The same model, asked with a renderer that cuts what is longer than its context: nothing is trained on it."""
    renderer = copy(opened.renderer)
    renderer.over_length = "truncate"
    return replace(opened, renderer=renderer)


def teller(recorder: Recorder) -> Callable[[str, int, int], None]:
    """Progress as events, a few seconds apart."""
    latest = time.monotonic()

    def tell(what: str, done: int, total: int) -> None:
        nonlocal latest
        if done and time.monotonic() - latest > TOLD_EVERY:
            latest = time.monotonic()
            recorder.record(Event("doing", {"what": f"{what}: {done} of {total}"}))

    return tell


def _recipe_of(run: RunDirectory) -> FinetuneRecipe | None:
    """The recipe of a run whose rows have a loss; None for one that is taught by rewards."""
    values = run.read_recipe()
    if values.get("recipe", "finetune") != "finetune":
        return None
    return located(validate(FinetuneRecipe, values), started_in(run))


def _text(
    name: str, kind: str, objective: Objective, trees: Sequence[Tree], reference: Reference = ITSELF
) -> Text:
    chosen = list(trees[:MOST_TREES])
    return Text(name, kind, lambda model: mean_loss(model, objective, chosen, reference=reference)[0])


def _kept(opened: Opened, file: str) -> tuple[Text, list[Tree]]:
    """A file whose text, or whose rows, should have been kept."""
    if not Path(file).is_file():
        raise DataError(f"there is no file {file}", allowed="a text file, or a data file with rows", do="check --keep")
    if Path(file).suffix.lower() in PLAIN:
        trees = kept_trees(opened, file)
        text = _text(Path(file).name, "kept", LanguageModelling(), trees)
    else:
        room = opened.model.context_tokens
        prepared = prepare(file, opened.tokenizer, Reading(over_length="truncate"), fraction=0.0, context_tokens=room)
        views = [prepared.train[index] for index in range(min(MOST_TREES, len(prepared.train)))]
        trees = [tree for view in views for tree in SFT().trees(view)]
        text = _text(Path(file).name, "other", SFT(), trees)
    if not trees:
        raise DataError(f"{file} holds no text", do="name a file with some for --keep")
    return text, trees


def _first_path(tree: Tree) -> Ints:
    """The tokens of the first text of a tree."""
    return np.concatenate([tree.segments[index].tokens for index in tree.paths()[0]])


def _gradients(
    model: LanguageModel, recipe: FinetuneRecipe, prepared: Prepared, reference: Reference
) -> Gradients | None:
    """Gradients of micro-batches of training rows; None where there are too few rows."""
    count = len(prepared.train)
    if count < 2:
        return None
    rows = MICRO_ROWS if count >= 8 * MICRO_ROWS else 1
    mean = float(np.mean(prepared.train.lengths))
    step = recipe.batch.rows or (recipe.batch.tokens or DEFAULT_STEP_TOKENS) / mean
    objective = recipe.objective

    def each(most: int) -> Iterator[Float[Tensor, " n"]]:
        order = np.random.default_rng(recipe.seed).permutation(count)
        for first in range(0, min(most * rows, count - rows + 1), rows):
            views = [prepared.train[int(index)] for index in order[first : first + rows]]
            trees = [tree for view in views for tree in objective.trees(view)]
            yield _gradient(model, objective, trees, reference) / rows

    return Gradients(each, rows=rows, step_rows=float(step), row_tokens=mean)


def _gradient(
    model: LanguageModel, objective: Objective, trees: Sequence[Tree], reference: Reference
) -> Float[Tensor, " n"]:
    """The gradient of the summed loss over some trees in whatever was trained, laid end to end."""
    own = [each for attachment in model.attachments.values() for each in attachment.named_parameters().values()]
    parameters = own or list(model.module.parameters())
    model.train(False)
    asked = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
        parameter.grad = None
    try:
        for bare in pack(sorted(trees, key=lambda tree: -tree.token_count), max_tokens=4096):
            forest = noted(model, bare, objective.refers, temperature=objective.policy_temperature, reference=reference)
            outputs = model.token_outputs(forest, temperature=objective.policy_temperature)
            objective.loss(outputs, forest).sum.backward()
        return torch.cat([(torch.zeros_like(each) if each.grad is None else each.grad).flatten().float()
                          for each in parameters])  # fmt: skip
    finally:
        for parameter, was in zip(parameters, asked, strict=True):
            parameter.grad = None
            parameter.requires_grad_(was)
