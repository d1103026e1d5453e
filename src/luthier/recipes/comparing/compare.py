"""Compare: one data file, one base model, several methods, the same budget, and a table of what came out.

Read top to bottom: each method is a recipe of its own, written where a user can run it again, and a process of its own,
so that its peak of memory is its own and a method that fails does not end the others. All are measured on the same
held-out rows, by their likelihood or by a metric of the answers that are generated for their prompts. In-context
learning is among them: the base model with training rows before each question, which costs nothing to train and more at
each query; where the two costs meet is told as in T-Few (arXiv 2205.05638, section 4.2).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, final

import yaml
from pydantic import Field, field_serializer, field_validator

from luthier.core import catalog
from luthier.core.child import answer_of, start_child
from luthier.core.chosen import choose
from luthier.core.errors import RecipeError
from luthier.core.events import Event, Recorder, plain
from luthier.core.knobs import Knobs
from luthier.core.nearest import choice
from luthier.metrics import Metric
from luthier.model.load import resolve_source
from luthier.recipes.comparing.rates import beyond, chosen, grid, settings_of_try
from luthier.recipes.schemas.files import load_recipe
from luthier.recipes.schemas.presets import IN_CONTEXT, preset
from luthier.store.comparison import write_comparison
from luthier.store.files import write_json, write_text

FOUND: Final = "comparison.json"
LIKELIHOOD: Final = "likelihood"
"""No metric: quality is what the trained tokens of held-out rows are given as probability."""


class Measures(Knobs):
    """How the methods of a comparison are measured, the same for all of them."""

    metric: Metric | None = Field(None, description="what judges generated answers; empty is likelihood, without any")
    questions: int = Field(200, ge=1, description="held-out prompts that are answered at most, for a metric")
    max_new_tokens: int = Field(128, ge=1, description="longest of these answers, in tokens")
    examples: int = Field(4, ge=0, description="training rows before each question, for in_context")
    keep: str = Field("", description="text file on which forgetting is measured; empty is the seedling's own kind")
    search: int = Field(1, ge=1, le=9, description="learning rates that are tried for each method, at least; 1 is none")
    search_share: float = Field(0.25, gt=0, le=1, description="share of the budget that each of several tries gets")

    @field_validator("metric", mode="before")
    @classmethod
    def _chosen(cls, value: object) -> object:
        if value is None or value == LIKELIHOOD:
            return None
        if isinstance(value, str) and value not in (names := catalog.names("metrics")):
            raise RecipeError(f"there is no metric {value!r}", do=choice(value, [LIKELIHOOD, *names]))
        return choose("metrics", Metric, value)

    @field_serializer("metric")
    def _written(self, metric: Metric | None) -> dict[str, Any] | str:
        return LIKELIHOOD if metric is None else metric.as_recipe()


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one process does: a method's recipe file, with `--set` values, and how its result is measured.

    One that is a `trial` only tells the loss that a learning rate comes to.
    """

    method: str
    recipe: str
    sets: tuple[str, ...]
    run: str
    measures: Mapping[str, Any]
    trial: bool = False


def compare(
    model: str,
    data: str,
    methods: Sequence[str],
    *,
    folder: Path,
    sets: Sequence[str] = (),
    measures: Measures | None = None,
    recorder: Recorder,
) -> dict[str, Any]:
    """Train and measure each method below `folder`; what was found, which is also written there as a page.

    Raises RecipeError for an unknown method, one that is named twice, or a recipe that does not hold together, before
    anything is trained.
    """
    how = measures or Measures()
    jobs = _jobs(model, data, methods, folder=folder, sets=tuple(sets), measures=how)
    found: list[dict[str, Any]] = []
    for job in jobs:
        which = f"{job.method} ({len(found) + 1} of {len(jobs)})"
        found.append(_found(job, folder, how, Doing(recorder, which)))
        comparison = {
            "model": model,
            "data": data,
            "set": list(sets),
            "measures": how.model_dump(mode="json"),
            "methods": found,
        }
        write_json(folder / FOUND, plain(comparison))
        write_comparison(folder, comparison)
    return comparison


def _jobs(
    model: str, data: str, methods: Sequence[str], *, folder: Path, sets: tuple[str, ...], measures: Measures
) -> list[Job]:
    """A job for each method, whose recipe is written; nothing is written unless all of them hold together."""
    if twice := {name for name in methods if list(methods).count(name) > 1}:
        raise RecipeError(f"{sorted(twice)[0]!r} is named twice", do="name each method once")
    if measures.keep and not Path(measures.keep).is_file():
        raise RecipeError(f"{measures.keep} is no file", do="name a text file whose loss tells what was forgotten")
    if not Path(data).exists():
        raise RecipeError(f"{data} is not there", do="name a data file: --data FILE")
    if measures.metric is not None:
        measures.metric.require()
    resolve_source(model)
    keys = {name: dict(preset(name)) for name in methods}
    if folder.exists() and any(folder.iterdir()):
        raise RecipeError(f"{folder} is not empty", do="name a new folder: --run DIR")
    source: dict[str, Any] = {"model": model, "data": {"train": str(Path(data).resolve())}}
    if measures.metric is not None:
        # Whoever has been trained on one answer to a prompt has an easy time with the others.
        source["evaluation"] = {"together": "prompts"}
    texts = {
        name: yaml.safe_dump({**source, **own, "run": str(folder / name)}, sort_keys=False)
        for name, own in keys.items()
    }
    with tempfile.TemporaryDirectory() as place:
        for name, text in texts.items():
            write_text(Path(place) / f"{name}.yaml", text)
            load_recipe(Path(place) / f"{name}.yaml", overrides=sets)
    (folder / "recipes").mkdir(parents=True, exist_ok=True)
    jobs, told = [], measures.model_dump(mode="json")
    for name, text in texts.items():
        path, run = folder / "recipes" / f"{name}.yaml", folder / name
        write_text(path, text)
        jobs.append(Job(method=name, recipe=str(path), sets=sets, run=str(run), measures=told))
    return jobs


def _found(job: Job, folder: Path, measures: Measures, doing: Doing) -> dict[str, Any]:
    """What a method comes to, at the best of several learning rates where these are looked for."""
    if job.method == IN_CONTEXT or measures.search == 1:
        doing.tell()
        return _run(job, folder)
    recipe = load_recipe(Path(job.recipe), overrides=job.sets).recipe
    rates = grid(recipe.optimizer.peak_learning_rate, measures.search)
    tried: list[dict[str, Any]] = []
    while len(tried) < len(rates):
        rate = rates[len(tried)]
        doing.tell(f": trying the rate {rate:g}")
        own = settings_of_try(recipe, rate, measures.search_share)
        tried.append(_run(replace(job, sets=(*job.sets, *own), trial=True), folder))
        if measures.search <= len(tried) == len(rates) < 2 * measures.search:
            more = beyond(rates, tried)
            rates += [] if more is None else [more]
    search = chosen(rates, tried, share=measures.search_share)
    if search["taken"] is None:
        said = "; ".join(search["errors"]) or "no loss was finite"
        return {"method": job.method, "error": f"none of the rates {rates} works: {said}", "search": search}
    doing.tell(f" at the rate {search['taken']:g}")
    sets = (*job.sets, f"optimizer.learning_rate={search['taken']}")
    return {**_run(replace(job, sets=sets), folder), "search": search}


def _run(job: Job, folder: Path) -> dict[str, Any]:
    """What a job's process found, or the error it ended with; what it printed meanwhile is added to METHOD.log."""
    with (folder / f"{job.method}.log").open("ab") as log:
        child = start_child("luthier.recipes.comparing.compared", [json.dumps(asdict(job))], stderr=log.fileno())
        answer, code = answer_of(child)
    try:
        found: Mapping[str, Any] = json.loads(answer)
    except ValueError:
        found = {"error": f"its process ended with exit code {code}; see {folder / (job.method + '.log')}"}
    return {"method": job.method, **found}


@final
@dataclass(frozen=True)
class Doing:
    """Tells what is being done for one method."""

    recorder: Recorder
    which: str

    def tell(self, more: str = "") -> None:
        """Say it, with what is special about it."""
        self.recorder.record(Event("doing", {"what": f"{self.which}{more}"}))


def require_methods(text: str) -> list[str]:
    """The methods of a list with commas. Raises RecipeError when there is none."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise RecipeError(f"--methods is {text!r}", allowed="names with commas between them",
                          do="for example --methods lora,ia3; without --methods all are compared")  # fmt: skip
    return names

