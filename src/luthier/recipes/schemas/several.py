"""The recipe of several adapters on one base: what they share, and of each what is its own.

Whatever is written beside `adapters` is for all of them; below a name stands what that adapter has otherwise. So each
adapter has a whole recipe of a fine-tune, which could also be run alone, and there is no second schema.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from luthier.core.errors import RecipeError
from luthier.core.knobs import validate
from luthier.core.nearest import did_you_mean
from luthier.core.recipe_file import merge, plain_layer, read_layers
from luthier.recipes.schemas.files import DEFAULT_METHODS, as_written, dated
from luthier.recipes.schemas.finetune import FinetuneRecipe
from luthier.recipes.schemas.names import SEVERAL

OWN: Final = ("data", "adapter", "objective", "optimizer", "schedule", "max_grad_norm", "budget", "evaluation", "seed")
"""What may differ from adapter to adapter: everything that is not the base, the batch, or how the run is kept."""
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]*")
_TAKEN: Final = ("adapter", "model", "checkpoints", "save")


@dataclass(frozen=True)
class SeveralRecipe:
    """A whole fine-tune for each adapter, on one base; `notices` is what is worth saying about how it was read."""

    adapters: Mapping[str, FinetuneRecipe]
    run: str | None = None
    notices: tuple[str, ...] = ()

    @property
    def first(self) -> FinetuneRecipe:
        """One of them, for what all of them share."""
        return next(iter(self.adapters.values()))

    def dated(self, day: str | None = None) -> SeveralRecipe:
        """With the day that the run begins."""
        return replace(self, adapters={name: dated(each, day) for name, each in self.adapters.items()})

    def as_written(self) -> dict[str, Any]:
        """The recipe as a run directory keeps it, without its place."""
        whole = {name: as_written(each) for name, each in self.adapters.items()}
        shared = {key: value for key, value in as_written(self.first).items() if key not in (*OWN, "recipe")}
        own = {name: {key: values[key] for key in OWN if key in values} for name, values in whole.items()}
        return {"recipe": SEVERAL, **shared, "adapters": own}


def names_several(path: Path, overrides: Sequence[str] = ()) -> bool:
    """Whether a recipe file is one of several adapters. What is wrong with it is told by those who read all of it."""
    try:
        return "adapters" in read_layers(path, sets=overrides, environ=os.environ, known=("adapters",)).values
    except RecipeError:
        return False


def load_several_recipe(path: Path, *, overrides: Sequence[str] = (), run: Path | None = None) -> SeveralRecipe:
    """The recipe of a file, the environment and `--set`, such as `--set adapters.french.adapter.rank=4`."""
    known = ("adapters", *FinetuneRecipe.model_fields)
    layered = read_layers(path, sets=overrides, environ=os.environ, known=known)
    found = several_of(layered.values, address=layered.address)
    return replace(found, notices=layered.notes, run=str(run) if run is not None else found.run)


def several_of(values: Mapping[str, Any], *, address: Callable[[str], str] = lambda key: "") -> SeveralRecipe:
    """The recipe in plain values. Raises RecipeError for names, keys and adapters that cannot be together."""
    if values.get("recipe", SEVERAL) != SEVERAL:
        raise RecipeError(
            f"recipe: {values['recipe']!r} beside adapters", allowed=SEVERAL, where=address("recipe")
        )
    named = values.get("adapters")
    if not isinstance(named, Mapping) or not named:
        raise RecipeError(
            f"adapters: {named!r}", allowed="names, and below each what is its own", where=address("adapters")
        )
    shared = {key: value for key, value in values.items() if key not in ("adapters", "recipe", "run")}
    made = {str(name): _one(str(name), own, shared, address) for name, own in named.items()}
    trains = [name for name, each in made.items() if "trains-base" in each.adapter.provides]
    if trains and len(made) > 1:
        raise RecipeError(
            f"adapters.{trains[0]}: {made[trains[0]].adapter.method_name()} trains the model's own weights, which the "
            "other adapters compute with",
            allowed="adapters beside the weights, such as lora, ia3 and prefix_tuning",
            do=f"train {trains[0]} with a recipe of its own",
            where=address(f"adapters.{trains[0]}.adapter"),
        )
    run = values.get("run")
    return SeveralRecipe(made, None if run is None else str(run))


def _one(name: str, own: object, shared: Mapping[str, Any], address: Callable[[str], str]) -> FinetuneRecipe:
    """The whole recipe of one adapter: its own keys over those of all."""
    place = f"adapters.{name}"
    if not _NAME.fullmatch(name) or name in _TAKEN:
        raise RecipeError(
            f"{name!r} cannot name an adapter",
            allowed=f"small letters, digits, - and _, but none of {', '.join(_TAKEN)}: it becomes a folder of the run",
            where=address(place),
        )
    if not isinstance(own, Mapping):
        raise RecipeError(f"{place}: {own!r}", allowed="keys such as data and adapter", where=address(place))
    for key in own:
        if key not in OWN:
            why = "is for all adapters" if key in FinetuneRecipe.model_fields else "is unknown"
            raise RecipeError(
                f"{place}.{key} {why}",
                allowed=", ".join(OWN),
                do=f"write {key} beside adapters" if "for all" in why else did_you_mean(str(key), OWN),
                where=address(f"{place}.{key}"),
            )
    layers = [plain_layer(each, origin="") for each in (DEFAULT_METHODS, shared, own)]

    def own_address(key: str) -> str:
        top = key.partition(".")[0]
        return address(key if top in shared and top not in own else f"{place}.{key}")

    recipe = validate(FinetuneRecipe, merge(layers).values, where=place, address=own_address)
    if recipe.checkpoint.keep < 2:
        raise RecipeError(
            f"checkpoint.keep: {recipe.checkpoint.keep}",
            allowed="at least 2 for several adapters: they go on from a step that all of them have",
            where=address("checkpoint.keep"),
        )
    return recipe
