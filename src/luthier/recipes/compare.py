"""Compare: one data file, one base model, several methods, the same budget, and a table of what came out.

Read top to bottom: each method is a recipe of its own, written where a user can run it again, and a process of its own,
so that its peak of memory is its own and a method that fails does not end the others. All are measured on the same
held-out rows. In-context learning is among them: the base model with training rows before each question, which costs
nothing to train and more at each query; where the two costs meet is told as in T-Few (arXiv 2205.05638, section 4.2).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from luthier.core.child import answer_of, start_child
from luthier.core.errors import RecipeError
from luthier.core.events import Event, Recorder, plain
from luthier.model.load import resolve_source
from luthier.recipes.files import load_recipe
from luthier.recipes.presets import preset
from luthier.store.comparison import write_comparison
from luthier.store.files import write_json, write_text

FOUND: Final = "comparison.json"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one process does: a method's recipe file, with `--set` values, and how its result is measured.

    `keep` is a text file on which forgetting is measured, empty for none; `examples` are those of in-context learning.
    """

    method: str
    recipe: str
    sets: tuple[str, ...]
    run: str
    keep: str
    examples: int


def compare(
    model: str,
    data: str,
    methods: Sequence[str],
    *,
    folder: Path,
    sets: Sequence[str] = (),
    keep: Path | None = None,
    examples: int = 4,
    recorder: Recorder,
) -> dict[str, Any]:
    """Train and measure each method below `folder`; what was found, which is also written there as a page.

    Raises RecipeError for an unknown method, one that is named twice, or a recipe that does not hold together, before
    anything is trained.
    """
    jobs = _jobs(model, data, methods, folder=folder, sets=tuple(sets), keep=keep, examples=examples)
    found: list[dict[str, Any]] = []
    for job in jobs:
        recorder.record(Event("doing", {"what": f"{job.method} ({len(found) + 1} of {len(jobs)})"}))
        found.append(_run(job, folder))
        comparison = {"model": model, "data": data, "set": list(sets), "methods": found}
        write_json(folder / FOUND, plain(comparison))
        write_comparison(folder, comparison)
    return comparison


def _jobs(
    model: str,
    data: str,
    methods: Sequence[str],
    *,
    folder: Path,
    sets: tuple[str, ...],
    keep: Path | None,
    examples: int,
) -> list[Job]:
    """A job for each method, whose recipe is written; nothing is written unless all of them hold together."""
    if twice := {name for name in methods if list(methods).count(name) > 1}:
        raise RecipeError(f"{sorted(twice)[0]!r} is named twice", do="name each method once")
    if keep is not None and not keep.is_file():
        raise RecipeError(f"{keep} is no file", do="name a text file whose loss tells what was forgotten")
    if not Path(data).exists():
        raise RecipeError(f"{data} is not there", do="name a data file: --data FILE")
    resolve_source(model)
    keys = {name: dict(preset(name)) for name in methods}
    if folder.exists() and any(folder.iterdir()):
        raise RecipeError(f"{folder} is not empty", do="name a new folder: --run DIR")
    source = {"model": model, "data": {"train": str(Path(data).resolve())}}
    texts = {
        name: yaml.safe_dump({**source, **own, "run": str(folder / name)}, sort_keys=False)
        for name, own in keys.items()
    }
    with tempfile.TemporaryDirectory() as place:
        for name, text in texts.items():
            write_text(Path(place) / f"{name}.yaml", text)
            load_recipe(Path(place) / f"{name}.yaml", overrides=sets)
    (folder / "recipes").mkdir(parents=True, exist_ok=True)
    jobs = []
    for name, text in texts.items():
        path, run, kept = folder / "recipes" / f"{name}.yaml", folder / name, "" if keep is None else str(keep)
        write_text(path, text)
        jobs.append(Job(method=name, recipe=str(path), sets=sets, run=str(run), keep=kept, examples=examples))
    return jobs


def _run(job: Job, folder: Path) -> dict[str, Any]:
    """What a job's process found, or the error it ended with; what it printed meanwhile is in METHOD.log."""
    with (folder / f"{job.method}.log").open("wb") as log:
        child = start_child("luthier.recipes.compared", [json.dumps(asdict(job))], stderr=log.fileno())
        answer, code = answer_of(child)
    try:
        found: Mapping[str, Any] = json.loads(answer)
    except ValueError:
        found = {"error": f"its process ended with exit code {code}; see {folder / (job.method + '.log')}"}
    return {"method": job.method, **found}


def require_methods(text: str) -> list[str]:
    """The methods of a list with commas. Raises RecipeError when there is none."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise RecipeError(f"--methods is {text!r}", allowed="names with commas between them, such as lora,ia3")
    return names

