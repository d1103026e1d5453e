"""What a probe looks at: a run or two folders, opened as a pair of models with texts to ask them about.

Read top to bottom: open the tuned model and its base, find what changed, and gather what they can be asked about: what
the run knows (probed_rows.py), and texts that should have been kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from luthier.adapters import saved_adapter
from luthier.core.errors import DataError, RecipeError
from luthier.core.events import Event, Recorder
from luthier.core.knobs import validate
from luthier.core.paths import cache_folder
from luthier.data.forest import Ints, Tree
from luthier.data.prepare import Reading, prepare
from luthier.model.comparing.base_spectra import FOLDER, BaseSpectra
from luthier.model.comparing.pair import Pair, Text, pair_of_adapter, pair_of_models
from luthier.model.files.adapter_config import CONFIG
from luthier.model.files.sources import SEEDLING
from luthier.objectives.language_model import LanguageModelling
from luthier.objectives.sft import SFT
from luthier.recipes.comparing.compared import kept_trees
from luthier.recipes.demo import grown_on
from luthier.recipes.opening.opened import Opened, kept_precision, open_named, read_extras
from luthier.recipes.opening.places import located
from luthier.recipes.opening.purpose import bound
from luthier.recipes.opening.quantized import load_base
from luthier.recipes.opening.results import of_policy, started_in
from luthier.recipes.probing.rows import MOST_TREES, first_path, known_of_prompts, known_of_rows, text_of
from luthier.recipes.schemas.kinds import kind_of_recipe
from luthier.recipes.schemas.reinforce import ReinforceRecipe
from luthier.store.runs import ADAPTER, MODEL, RunDirectory, is_run

PLAIN = (".txt", ".md")
"""Endings of kept files that are one text each; others are rows."""
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
    opened, run = open_named(str(run.folder), own_modules=False), of_policy(run)
    values = run.read_recipe()
    recipe = located(validate(kind_of_recipe(values), values), started_in(run))
    recipe = recipe.model_copy(update={"objective": bound(recipe.objective, recipe.model, opened.tokenizer)})
    base = None
    if (run.folder / MODEL).is_dir():
        precision = kept_precision(read_extras(run.folder / MODEL), recipe.precision)
        base = load_base(
            recipe.model, precision=precision, device=recipe.device, seed=recipe.seed, task=opened.model.task
        )
    known = (known_of_prompts(run, recipe, opened) if isinstance(recipe, ReinforceRecipe)
             else known_of_rows(recipe, opened, base))  # fmt: skip
    more = _more(opened, keep, recipe.model, [*known.texts], [*known.samples], recorder)
    more |= {"settings": recipe.adapter.as_recipe(), "gradients": known.gradients}
    pair = pair_of_adapter(opened.model, **more) if base is None else pair_of_models(base, opened.model, **more)
    return Probed(pair, recipe.model, str(run.folder), opened, run.folder / ADAPTER if base is None else None)


def probed_folders(before: str, after: str, keep: Sequence[str] = (), *, recorder: Recorder) -> Probed:
    """The pair of two models, or of a model and an adapter for it, by their folders or ids."""
    if is_run(Path(after)) or is_run(Path(before)):
        raise RecipeError(f"{before} and {after}: one of them is a run, which knows its own base",
                          do="luthier probe RUN")  # fmt: skip
    adapter = Path(after) if (Path(after) / CONFIG).is_file() else None
    # In float32: what rounding to fewer bits would change is no finding.
    settings: Mapping[str, Any] = {}
    if adapter is not None:
        opened = open_named(before, adapter=after, precision="float32", own_modules=False)
        settings = saved_adapter(adapter, opened.model.sites).as_recipe()
        pair = pair_of_adapter(opened.model, settings=settings, **_more(opened, keep, before, [], [], recorder))
        return Probed(pair, before, after, opened, adapter)
    opened = open_named(after, precision="float32", own_modules=False)
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
        samples += [first_path(tree) for tree in trees]
    if source == SEEDLING and opened.model.task.speaks:
        trees = grown_on(opened)[:MOST_TREES]
        texts.append(text_of("the seedling's own kind of text", "kept", LanguageModelling(), trees))
        samples = samples or [first_path(tree) for tree in trees]
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


def _kept(opened: Opened, file: str) -> tuple[Text, list[Tree]]:
    """A file whose text, or whose rows, should have been kept."""
    if not Path(file).is_file():
        raise DataError(f"there is no file {file}", allowed="a text file, or a data file with rows", do="check --keep")
    if Path(file).suffix.lower() in PLAIN:
        trees = kept_trees(opened, file)
        text = text_of(Path(file).name, "kept", LanguageModelling(), trees)
    else:
        room = opened.model.context_tokens
        prepared = prepare(file, opened.tokenizer, Reading(over_length="truncate"), fraction=0.0, context_tokens=room)
        views = [prepared.train[index] for index in range(min(MOST_TREES, len(prepared.train)))]
        trees = [tree for view in views for tree in SFT().trees(view)]
        text = text_of(Path(file).name, "other", SFT(), trees)
    if not trees:
        raise DataError(f"{file} holds no text", do="name a file with some for --keep")
    return text, trees
