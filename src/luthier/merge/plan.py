"""What a merge will do, before it does any of it: each tensor of the result, where its rows come from, and its knobs.

Idea: all names, shapes and types are known from headers. So parents of other shapes, missing tensors and knobs that no
tensor can have are told before a byte is written, and the plan says what will be read, written and held.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, final

import numpy as np
from jaxtyping import Int

from luthier.core.errors import RecipeError
from luthier.core.knobs import validate
from luthier.core.nearest import nearest
from luthier.data.strict_json import excerpt
from luthier.kernels.floats import DType, is_real
from luthier.merge.parents import Parent
from luthier.merge.settings import Setting, Spot
from luthier.mergers import BASE, Merger
from luthier.model.editing.role_names import in_layer, layer_of, tensor_roles
from luthier.model.files.shards import Slot

OF_LAYERS: Final = ("layer_types", "sliding_window_pattern", "no_rope_layers", "mlp_layer_types")
"""Lists of a config with an entry for each layer."""


@final
@dataclass(frozen=True)
class Origin:
    """A tensor of one parent; `rows` are the rows that the merged tensor takes, where it does not take them all."""

    parent: int
    name: str
    rows: Int[np.ndarray, " rows"] | None = None


@final
@dataclass(frozen=True)
class Job:
    """One tensor of the result. A `copied` one has no numbers to compute with, and is the same in all parents."""

    name: str
    slot: Slot
    models: tuple[Origin, ...]
    base: Origin | None
    weights: tuple[float, ...]
    method: Merger
    copied: bool = False

    @property
    def origins(self) -> tuple[Origin, ...]:
        return self.models if self.base is None else (*self.models, self.base)


@final
@dataclass(frozen=True)
class Slice:
    """Layers of the result that come from the same layers of several parents: for each its number and its first."""

    count: int
    sources: tuple[tuple[int, int], ...]
    settings: Mapping[str, Setting] = field(default_factory=dict)
    weights: Mapping[int, Setting] = field(default_factory=dict)


@final
@dataclass(frozen=True)
class Wanted:
    """What is asked for. `weights` are those of the models, `vary` the knobs that differ from tensor to tensor.

    `base` is the number of the base among the parents, which is not among the models. `slices` are empty where all
    layers are taken as they are. `vocabulary` maps rows of embedding and head, by parent.
    """

    method: Merger
    models: tuple[int, ...]
    base: int | None
    weights: tuple[Setting, ...]
    dtype: DType
    vary: Mapping[str, Setting] = field(default_factory=dict)
    slices: tuple[Slice, ...] = ()
    vocabulary: Mapping[int, Int[np.ndarray, " rows"]] = field(default_factory=dict)
    vocabulary_rows: int = 0


@final
@dataclass(frozen=True)
class Plan:
    """All jobs, in the order of the first parent's files."""

    jobs: tuple[Job, ...]
    layers: int

    @property
    def slots(self) -> dict[str, Slot]:
        return {job.name: job.slot for job in self.jobs}


def plan(parents: Sequence[Parent], wanted: Wanted) -> Plan:
    """The jobs of a merge. Raises RecipeError for parents that do not fit each other, or knobs that fit no tensor."""
    if not wanted.slices:
        wanted.method.require(len(wanted.models), base=wanted.base is not None)
    unknown = [key for key in wanted.vary if key not in type(wanted.method).model_fields]
    if unknown:
        raise RecipeError(f"{wanted.method.method_name()} has no knob {unknown[0]!r}",
                          allowed=", ".join(type(wanted.method).model_fields) or "no knobs at all")  # fmt: skip
    if not wanted.slices:
        _require_same_names(parents, wanted)
    first = parents[wanted.models[0]]
    layers = sum(each.count for each in wanted.slices) or first.layers
    jobs = []
    for name in first.shards.slots:
        if wanted.slices and layer_of(name) is not None:
            continue
        jobs.append(_job(parents, wanted, Spot.of(name, layers), _everywhere(parents, wanted, name), None))
    start = 0
    for each in wanted.slices:
        _require_layers(parents, each)
        for step in range(each.count):
            own = parents[each.sources[0][0]]
            for name in [name for name in own.shards.slots if layer_of(name) == each.sources[0][1] + step]:
                origins = {parent: in_layer(name, begin + step) for parent, begin in each.sources}
                spot = Spot.of(in_layer(name, start + step), each.count, layer=step)
                jobs.append(_job(parents, wanted, spot, origins, each))
        start += each.count
    return Plan(tuple(jobs), layers)


def _require_layers(parents: Sequence[Parent], slice_: Slice) -> None:
    for number, first in slice_.sources:
        parent = parents[number]
        held = 1 + max((layer for name in parent.shards.slots if (layer := layer_of(name)) is not None), default=-1)
        if first + slice_.count > held:
            raise RecipeError(f"a slice takes the layers {first} to {first + slice_.count - 1} of {parent.name}",
                              allowed=f"the layers 0 to {held - 1}, which it has",
                              do="in a recipe of mergekit the second number of layer_range is the layer behind the last"
                              )  # fmt: skip


def _everywhere(parents: Sequence[Parent], wanted: Wanted, name: str) -> dict[int, str]:
    """A tensor outside of slices: in a stack what lies behind the layers is the last slice's, the rest the first's."""
    if not wanted.slices:
        return dict.fromkeys([*wanted.models, *([] if wanted.base is None else [wanted.base])], name)
    before = bool({"embed", "table"} & set(tensor_roles(name)))
    return {parent: name for parent, _ in wanted.slices[0 if before else -1].sources}


def _job(
    parents: Sequence[Parent], wanted: Wanted, spot: Spot, origins: Mapping[int, str], slice_: Slice | None
) -> Job:
    name = spot.name
    found = {parent: _origin(parents, wanted, parent, own) for parent, own in origins.items()}
    numbers = [parent for parent in wanted.models if parent in found]
    if not numbers or (BASE in wanted.method.requires and wanted.base not in found):
        raise RecipeError(f"a slice has no {'base' if numbers else 'model'} for {excerpt(name)}",
                          do="name one among the sources of each slice")  # fmt: skip
    wanted.method.require(len(numbers), base=wanted.base is not None)
    models = tuple(found[parent] for parent in numbers)
    base = None if wanted.base is None else found.get(wanted.base)
    slot = _same_slot(parents, name, (*models, *([] if base is None else [base])))
    own_weights = {} if slice_ is None else slice_.weights
    weights = [own_weights.get(parent, wanted.weights[wanted.models.index(parent)]).at(spot) for parent in numbers]
    plain = is_real(slot.dtype)
    return Job(
        name,
        Slot(wanted.dtype, slot.shape) if plain else slot,
        models,
        base,
        tuple(1.0 if weight is None else weight for weight in weights),
        _method(wanted, spot, slice_),
        copied=not plain,
    )


def _origin(parents: Sequence[Parent], wanted: Wanted, parent: int, name: str) -> Origin:
    if name not in parents[parent].shards.slots:
        close = nearest(name, list(parents[parent].shards.slots))
        raise RecipeError(f"{parents[parent].name} has no tensor {excerpt(name)}",
                          allowed=f"models of one shape; nearest is {close[0]}" if close else "models of one shape",
                          do="merge models of the same architecture and size")  # fmt: skip
    rows = wanted.vocabulary.get(parent) if {"embed", "head"} & set(tensor_roles(name)) else None
    return Origin(parent, name, rows)


def _same_slot(parents: Sequence[Parent], name: str, origins: Sequence[Origin]) -> Slot:
    """Type and shape of a merged tensor. Raises RecipeError where those of the parents differ."""
    slots = []
    for origin in origins:
        slot = parents[origin.parent].shards.slots[origin.name]
        shape = slot.shape if origin.rows is None else (len(origin.rows), *slot.shape[1:])
        slots.append(Slot(slot.dtype, shape))
    for origin, slot in zip(origins, slots, strict=True):
        rows = "; other vocabularies: --set tokenizer=union" if {"embed", "head"} & set(tensor_roles(name)) else ""
        if slot.shape != slots[0].shape or is_real(slot.dtype) != is_real(slots[0].dtype):
            one, other = parents[origins[0].parent].name, parents[origin.parent].name
            raise RecipeError(
                f"{excerpt(name)} is {list(slots[0].shape)} in {one} and {list(slot.shape)} in {other}",
                allowed="models of one shape",
                do=f"merge models of the same architecture and size{rows}",
            )
    return slots[0]


def _method(wanted: Wanted, spot: Spot, slice_: Slice | None) -> Merger:
    """The method with the knobs of one tensor."""
    vary = {**wanted.vary, **({} if slice_ is None else slice_.settings)}
    own: dict[str, Any] = {key: value for key, setting in vary.items() if (value := setting.at(spot)) is not None}
    if not own:
        return wanted.method
    return validate(type(wanted.method), {**wanted.method.model_dump(), **own}, where=f"method at {spot.name}")


def _require_same_names(parents: Sequence[Parent], wanted: Wanted) -> None:
    numbers = [*wanted.models, *([] if wanted.base is None else [wanted.base])]
    first = parents[numbers[0]]
    for number in numbers[1:]:
        other = parents[number]
        missing = [name for name in first.shards.slots if name not in other.shards.slots]
        extra = [name for name in other.shards.slots if name not in first.shards.slots]
        for names, has, lacks in ((missing, first, other), (extra, other, first)):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                tied = "; one of them ties its head to its embedding" if "lm_head.weight" in names else ""
                raise RecipeError(
                    f"{has.name} has {excerpt(names[0])}{more}, which {lacks.name} does not{tied}",
                    allowed="models of one shape",
                    do="merge models of the same architecture and size",
                )
