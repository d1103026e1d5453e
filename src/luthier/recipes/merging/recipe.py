"""The recipe of a merge: which models, by which method, and what the result is like."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_serializer, field_validator, model_validator

from luthier.core import catalog
from luthier.core.chosen import Chosen
from luthier.core.errors import RecipeError
from luthier.core.knobs import Knobs, validate
from luthier.core.yaml_text import parse
from luthier.merge.settings import Setting
from luthier.mergers import Merger
from luthier.recipes.merging.mergekit import is_mergekit, translated

Layers = Annotated[tuple[int, int], Field(strict=False)]


class ParentKnobs(Knobs):
    """A model that is merged."""

    model: str = Field(description="run directory, model folder, hub id, or seedling")
    adapter: str | None = Field(None, description="folder of a LoRA adapter (PEFT's format) on top of it")
    weight: Any = Field(1.0, description="a number, a list over the layers, or rules by role or name")

    @field_validator("weight", mode="after")
    @classmethod
    def _a_setting(cls, value: Any) -> Any:
        Setting.of(value, "weight")
        return value


class SourceKnobs(Knobs):
    """Layers of one model in a slice."""

    model: str = Field(description="one of the models, or the base, as it is named there")
    layers: Layers = Field(description="the first layer and the one behind the last, counted from 0")
    weight: Any = Field(None, description="the model's weight in this slice; empty is its own")


class SliceKnobs(Knobs):
    """Layers of the result, above those of the slices before."""

    sources: Annotated[tuple[SourceKnobs, ...], Field(strict=False, min_length=1)] = Field(
        description="the layers that become these, as many of each model"
    )
    vary: dict[str, Any] = Field(default_factory=dict, description="knobs of the method in this slice")


class MergeRecipe(Knobs):
    """Several models of one shape as one."""

    recipe: Literal["merge"] = Field("merge", description="which story of recipes/ this file tells")
    models: Annotated[tuple[ParentKnobs, ...], Field(strict=False, min_length=1)] = Field(
        description="the models that are merged; config and tokenizer are the first one's"
    )
    base: str | None = Field(None, description="the model that all of them come from, for methods that merge changes")
    method: Annotated[Merger, Chosen("mergers")] = Field(description="how tensors are merged")
    vary: dict[str, Any] = Field(default_factory=dict, description="knobs that differ by layer, role or name")
    slices: Annotated[tuple[SliceKnobs, ...], Field(strict=False)] = Field(
        (), description="a stack of layers; empty takes all layers as they are"
    )
    tokenizer: Literal["auto", "first", "union"] = Field(
        "auto", description="whose tokens the result has, where they differ; auto is union"
    )
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16", description="type of the numbers that are written; float32 is computed in"
    )
    memory_gb: float = Field(1.0, gt=0, description="what may be held at once beside the program itself, in 10^9 bytes")
    shard_gb: float = Field(5.0, gt=0, description="largest weight file, in 10^9 bytes")
    threads: int = Field(2, ge=1, le=64, description="blocks that are computed at the same time")
    parity: Literal["logits", "none"] = Field(
        "logits", description="whether the result's logits are held against those of the parents merged anew"
    )

    @field_validator("models", mode="before")
    @classmethod
    def _bare_names(cls, value: object) -> object:
        listed = value if isinstance(value, (list, tuple)) else [value]
        return [{"model": each} if isinstance(each, str) else each for each in listed]

    @model_validator(mode="before")
    @classmethod
    def _courses_apart(cls, values: Any) -> Any:
        """A knob of the method that is no single value holds by tensor: it goes to `vary`."""
        method = values.get("method") if isinstance(values, Mapping) else None
        if not isinstance(method, Mapping):
            return values
        courses = {key: each for key, each in method.items() if isinstance(each, (list, tuple, Mapping))}
        plain = {key: each for key, each in method.items() if key not in courses}
        return {**values, "method": plain, "vary": {**courses, **(values.get("vary") or {})}}

    @field_validator("vary", mode="after")
    @classmethod
    def _settings(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key, each in value.items():
            Setting.of(each, key)
        return value

    @field_serializer("method")
    def _as_written(self, method: Merger) -> dict[str, Any]:
        return method.as_recipe()

    @model_validator(mode="after")
    def _slices_of_these(self) -> MergeRecipe:
        known = [parent.model for parent in self.models] + ([self.base] if self.base else [])
        for each in self.slices:
            counts = {source.layers[1] - source.layers[0] for source in each.sources}
            if len(counts) != 1 or min(counts) < 1 or min(source.layers[0] for source in each.sources) < 0:
                raise RecipeError(f"a slice has the layers {[list(source.layers) for source in each.sources]}",
                                  allowed="as many layers of each model, at least one")  # fmt: skip
            for source in each.sources:
                if source.model not in known:
                    raise RecipeError(f"a slice names {source.model}", allowed=", ".join(known),
                                      do="list it among the models")  # fmt: skip
        return self


def from_flags(
    models: list[str],
    method: str,
    *,
    base: str | None,
    weights: list[float] | None,
    knobs: Mapping[str, Any],
    sets: Mapping[str, Any],
) -> MergeRecipe:
    """The recipe of a command line. Raises RecipeError for weights that are not one for each."""
    if method not in catalog.names("mergers"):
        catalog.load("mergers", method)
    if weights and len(weights) != len(models):
        raise RecipeError(f"{len(weights)} weights for {len(models)} models", allowed="--weight once for each model")
    parents = [{"model": name, **({"weight": weight} if weights else {})}
               for name, weight in zip(models, weights or [1.0] * len(models), strict=True)]  # fmt: skip
    given = {key: value for key, value in knobs.items() if value is not None}
    values: dict[str, Any] = {"models": parents, "method": {"method": method, **given}}
    values |= {"base": base} if base else {}
    return validate(MergeRecipe, laid_over(values, sets))


def is_recipe(name: str) -> bool:
    """Whether a command line names a recipe file rather than a model."""
    return name.endswith((".yaml", ".yml")) and not Path(name).is_dir()


def read_recipe(path: Path, *, sets: Mapping[str, Any] | None = None) -> tuple[MergeRecipe, tuple[str, ...]]:
    """The recipe in a file, ours or mergekit's, with top-level keys replaced by `sets`; and what to tell of it."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        do = "check the path, or name models and a folder: luthier merge A B --out DIR"
        raise RecipeError(f"there is no recipe {path}", do=do) from None
    except (OSError, UnicodeDecodeError) as failure:
        why = failure.strerror if isinstance(failure, OSError) else "it is no UTF-8 text"
        raise RecipeError(f"the recipe cannot be read: {why}", where=str(path), do="check the path") from None
    values = parse(text, name=str(path)).value
    if not isinstance(values, dict):
        kind = "a recipe that is a list" if isinstance(values, list) else "a recipe that is a single value"
        raise RecipeError(
            "the recipe is empty" if values is None else kind, allowed="a mapping of keys to values", where=str(path),
            do="name models and a folder instead: luthier merge A B --out DIR",
        )  # fmt: skip
    if "data" in values and "models" not in values:
        raise RecipeError("it names data and no models", allowed="models and method, or a recipe of mergekit",
                          do=f"what trains a model is run by: luthier train {path}", where=str(path))  # fmt: skip
    values, notes = translated(values) if is_mergekit(values) else (values, ())
    return validate(MergeRecipe, laid_over(values, sets or {})), notes


def laid_over(values: Mapping[str, Any], sets: Mapping[str, Any]) -> dict[str, Any]:
    """Values with those of dotted keys in their place."""
    found = dict(values)
    for key, value in sets.items():
        head, _, rest = key.partition(".")
        inner = found.get(head)
        found[head] = laid_over(inner if isinstance(inner, dict) else {}, {rest: value}) if rest else value
    return found
