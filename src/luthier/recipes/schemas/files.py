"""Recipes as files: reading one with its layers and origins, writing a commented one, and opening its run directory."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from luthier.core import catalog
from luthier.core.chosen import Chosen
from luthier.core.knobs import Method
from luthier.core.paths import RUNS, run_folder, slug
from luthier.core.recipe_file import Layered, origins_table, read_layers, validated
from luthier.recipes.schemas.finetune import FinetuneRecipe
from luthier.recipes.schemas.kinds import KINDS, kind_of_recipe, require_one_run
from luthier.store.environment import receipt
from luthier.store.runs import RunDirectory, State, is_begun

WIDTH = 118
DEFAULT_METHODS: dict[str, Any] = {
    "adapter": {"method": "lora"},
    "quantizer": {"method": "none"},
    "objective": {"method": "sft"},
    "optimizer": {"method": "adamw"},
    "schedule": {"method": "cosine"},
}
"""What `--set adapter.rank=32` hangs on when the recipe names no adapter."""


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe, where each of its values came from, and what is worth saying about how it was read."""

    recipe: FinetuneRecipe
    origins: list[tuple[str, Any, str]]
    notices: tuple[str, ...]


def load_recipe(path: Path | None, *, overrides: Sequence[str] = (), run: Path | None = None) -> LoadedRecipe:
    """The recipe of a file, the environment and `--set`, in rising order of strength."""
    sets = [*overrides, *([f"run={_scalar(str(run))}"] if run is not None else [])]
    kinds: list[type[FinetuneRecipe]] = [FinetuneRecipe, *KINDS.values()]
    every = tuple(dict.fromkeys(name for each in kinds for name in each.model_fields))
    written = read_layers(path, sets=sets, environ=os.environ, known=every)
    require_one_run(written)
    kind = kind_of_recipe(written.values)
    known = tuple(kind.model_fields)
    usual = kind.model_fields["objective"].get_default(call_default_factory=True)
    defaults = {**DEFAULT_METHODS, "objective": {"method": usual.method_name()}}
    layered = _traced(read_layers(path, sets=sets, environ=os.environ, defaults=defaults, known=known))
    recipe = validated(kind, layered)
    origins = origins_table(recipe.model_dump(mode="json"), layered)
    if run is not None:
        origins = [(key, value, "--run" if key == "run" else origin) for key, value, origin in origins]
    return LoadedRecipe(recipe, origins, layered.notes)


def place_of(recipe: FinetuneRecipe) -> Path:
    """The folder a recipe's run goes to."""
    return Path(recipe.run) if recipe.run else run_folder(_name_of(recipe), today=datetime.date.today())


@contextmanager
def begin_run(
    recipe: FinetuneRecipe, *, overwrite: bool = False, command: Sequence[str] = ()
) -> Iterator[RunDirectory]:
    """A new run directory for a recipe, locked, with the environment and the recipe written into it."""
    folder = place_of(recipe)
    with RunDirectory.begin(folder, overwrite=overwrite) as run:
        more = {"torch_threads": torch.get_num_threads(), "cuda": torch.cuda.is_available()}
        run.write_environment(receipt(list(command) or sys.argv, more=more))
        # The recipe last: from then on the run has begun, and the same command goes on with it.
        run.write_recipe({**as_written(dated(recipe)), "run": str(folder)})
        yield run


def unfinished(recipe: FinetuneRecipe) -> RunDirectory | None:
    """The run that this very recipe began and did not finish, so that the same command goes on with it.

    The same recipe would come to the same bits from the start, only later. Without a place of its own in the recipe,
    the newest run of its name counts that was stopped or interrupted.
    """
    states: tuple[State, ...]
    if recipe.run:
        places, states = [Path(recipe.run)], ("new", "running", "interrupted", "stopped", "failed")
    else:
        places = sorted(Path(RUNS).glob(f"*-{slug(_name_of(recipe))}*"), key=lambda path: path.name, reverse=True)
        states = ("interrupted", "stopped")
    for place in places:
        if is_begun(place) and (run := RunDirectory.open(place)).status().state in states:
            written = {key: value for key, value in run.read_recipe().items() if key != "run"}
            day = written.get("data", {}).get("date")
            if written == as_written(dated(recipe, day) if day else recipe):
                return run
    return None


def dated(recipe: FinetuneRecipe, day: str | None = None) -> FinetuneRecipe:
    """With the day that the run begins: a chat template that shows the date shows this one when it goes on, too."""
    if recipe.data.date is not None:
        return recipe
    today = day or datetime.date.today().isoformat()
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"date": today})})


def as_written(recipe: FinetuneRecipe) -> dict[str, Any]:
    """The recipe as a run directory keeps it, without its place."""
    return recipe.model_dump(mode="json", exclude_none=True, exclude={"run"})


def write_template(*, model: str, data: str, overrides: Sequence[str] = ()) -> str:
    """A recipe as text: every knob with its meaning above it; those at their default are commented out."""
    given = [f"model={yaml.safe_dump(model).splitlines()[0]}", f"data.train={yaml.safe_dump(data).splitlines()[0]}"]
    known = tuple(FinetuneRecipe.model_fields)
    layered = _traced(read_layers(None, sets=[*given, *overrides], defaults=DEFAULT_METHODS, known=known))
    recipe = validated(FinetuneRecipe, layered)
    lines = [
        "# A luthier recipe. Run it with: luthier train THIS_FILE",
        "# Lines that are commented out show defaults. What a method does: luthier describe METHOD",
    ]
    return "\n".join([*lines, *_fields(recipe, layered.values, indent="")]) + "\n"


def _name_of(recipe: FinetuneRecipe) -> str:
    return f"{recipe.model.rstrip('/').rpartition('/')[2]}-{recipe.adapter.method_name()}"


def _traced(layered: Layered) -> Layered:
    """With a method's own place for its section, where the section as such is a default and only the method is not."""
    own = {family: layered.places.get(f"{family}.method", "") for family in DEFAULT_METHODS}
    given = {family: place for family, place in own.items() if layered.places.get(family) == "default" and place}
    return replace(layered, places={**layered.places, **given})


def _fields(knobs: BaseModel, given: Mapping[str, Any], *, indent: str) -> list[str]:
    lines: list[str] = []
    blank = [] if indent else [""]
    for name, field in type(knobs).model_fields.items():
        value = getattr(knobs, name)
        if isinstance(value, BaseModel):
            inside = given.get(name)
            lines += [*blank, f"{indent}# {_meaning(field)}", f"{indent}{name}:"]
            chosen = [f"{indent}  method: {value.method_name()}"] if isinstance(value, Method) else []
            lines += chosen + _fields(value, inside if isinstance(inside, Mapping) else {}, indent=indent + "  ")
        else:
            mark = "" if name in given or field.is_required() else "# "
            lines += [*blank, f"{indent}# {_meaning(field)}"]
            lines.append(f"{indent}{mark}{name}: {_scalar(value)}")
    return lines


def _meaning(field: FieldInfo) -> str:
    family = next((item.family for item in field.metadata if isinstance(item, Chosen)), None)
    choices = f" ({', '.join(catalog.names(family))})" if family else ""
    return f"{field.description}{choices}"


def _scalar(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=WIDTH).replace("\n...", "").strip()
