"""Memory and disk of a run, before it starts: the formulas of `arithmetic/` with a model's and a data set's sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from luthier.arithmetic import memory as bytes_of
from luthier.core.errors import DiskFullError, RecipeError
from luthier.core.units import bytes_text, count_text, percent_text
from luthier.data.forest import Forest
from luthier.data.prepare import Prepared
from luthier.kernels import pool
from luthier.kernels.many import multiplies_many
from luthier.kernels.native_backend import NativeBackend
from luthier.model.editing.attachment import Attachment
from luthier.model.editing.edits import base_parameters
from luthier.model.language_model import LanguageModel
from luthier.model.packed import stored_bytes
from luthier.model.packing import packed_sites
from luthier.optimizers import Optimizer
from luthier.quantizers import Quantizer
from luthier.recipes.schemas.files import place_of
from luthier.recipes.schemas.finetune import FinetuneRecipe
from luthier.recipes.schemas.offload import Offload, inputs_are_far, optimizer_is_far
from luthier.recipes.sizing.room import free_disk, free_memory
from luthier.recipes.sizing.sizes import decoder_of, work_with, work_without
from luthier.recipes.sizing.zoo_memory import Counted, load_of
from luthier.train.source import DataSource, MicroBatch

PARTS = ("weights", "trained", "gradients", "optimizer", "activations", "working", "libraries", "saving")
"""What memory is needed for, as a plan names it: activations are kept for a backward pass, others are at work."""
ROOMY = 4
"""As many times what a plan counts leave no doubt that it fits: plans of the models that were measured are off by a
seventh at most."""


def plan_memory(
    recipe: FinetuneRecipe,
    model: LanguageModel,
    attachment: Attachment,
    source: DataSource,
    steps: int,
    *,
    saves: int,
    pooled: bool,
) -> dict[str, int]:
    """Bytes at the peak of the run, by part, with `total` and what is `available` to this process (weights included).

    `tokens` and `longest` are those of the largest micro-batch, from the lengths of the rows. `recomputed` is how many
    blocks are recomputed, by the recipe or because it takes so many to fit; `without` is the total if none were.
    `copy` is what a checkpoint is written from; of `saves` checkpoints all but the last are written during passes.
    `host` is what lies in the host's memory instead.
    """
    largest = source.largest_micro_batches(recipe.batch.micro_tokens, steps)
    batches = {batch: Forest(tuple(source.trees_of(batch))) for batch in largest}
    parts = lasting(model, attachment, recipe.optimizer, offload=recipe.batch.offload)
    # The copy that a checkpoint is written from lies on the host, wherever the model is.
    copy = bytes_of.staging(attachment.parameter_count, parts["optimizer"]) if model.device.type == "cpu" else 0
    meanwhile = saves > 1

    def whole(widest: Pass) -> dict[str, int]:
        freed = parts["gradients"] + widest.bytes
        return {**parts, "activations": widest.kept, "working": widest.working,
                "saving": bytes_of.saving(copy, meanwhile=meanwhile, freed=freed)}  # fmt: skip

    available = free_memory(model.device) + parts["weights"] + parts["trained"]
    room = available - sum(parts.values()) - copy * meanwhile
    tried = _recomputed(recipe, model)
    far = inputs_are_far(recipe.batch.offload)
    passes = passes_of(model, attachment, batches, {*tried, 0}, pooled=pooled, far=far)
    # As few as fit; if none do, as few as save most.
    least = min(tried, key=lambda count: passes[count].bytes)
    count = next((count for count in tried if passes[count].bytes <= room), least)
    needed = whole(passes[count])
    return {
        **{name: needed[name] for name in PARTS},
        "total": sum(needed.values()),
        "available": available,
        "tokens": passes[count].tokens,
        "longest": passes[count].longest,
        "recomputed": count,
        "blocks": model.sites.layers,
        "without": sum(whole(passes[0]).values()),
        "copy": copy,
        "host": passes[count].far + far_optimizer(attachment, recipe.optimizer, recipe.batch.offload),
    }


def certain_to_fit(memory: Mapping[str, int], device: torch.device, *, among: int = 1) -> bool:
    """Whether a plan needs so little of the host's memory that trying it first is in vain; `among` plans share it.

    On a GPU trying costs nothing, and finds what no plan counts.
    """
    return device.type == "cpu" and memory["total"] * among * ROOMY <= memory["available"]


def lasting(
    model: LanguageModel,
    attachment: Attachment,
    optimizer: Optimizer,
    *,
    quantizer: Quantizer | None = None,
    device: str | None = None,
    offload: Offload = "none",
) -> dict[str, int]:
    """Bytes that stay from step to step, by part; no checkpoint is being written.

    Of a model without memory, `quantizer` is what its weights would be packed by, `device` the kind it would be on.
    """
    trained = attachment.named_parameters().values()
    found = sum(constant.nbytes for constant in attachment.named_constants().values())
    far = optimizer_is_far(offload)
    wide = 0 if far else sum(bytes_of.masters(p.numel(), p.element_size()) for p in trained)
    on_cpu = (device or model.device.type) == "cpu"
    return {
        # Of base weights that are trained the originals are kept aside, so they count in both.
        "weights": _weights(model, quantizer),
        "trained": found + sum(p.nbytes for p in trained) + wide,
        "gradients": _gradients(attachment, optimizer, far=far),
        "optimizer": 0 if far else optimizer.resident_bytes(_shapes(attachment)),
        "libraries": _libraries(model, attachment, device) if on_cpu else 0,
        "saving": 0,
    }


def _libraries(model: LanguageModel, attachment: Attachment, device: str | None) -> int:
    """What products take beside their numbers. A model without memory has no backend yet: it gets the fastest."""
    native = isinstance(model.executor.backend, NativeBackend) or model.device.type != "cpu"
    ours = native and multiplies_many() and work_without(model, attachment, device=device).ours.everything
    return bytes_of.libraries(model.dtype.itemsize, threads=torch.get_num_threads(), ours=ours)


def far_optimizer(attachment: Attachment, optimizer: Optimizer, offload: Offload) -> int:
    """Bytes in the memory of the host that steps."""
    if not optimizer_is_far(offload):
        return 0
    return bytes_of.far_optimizer(attachment.parameter_count, optimizer.resident_bytes(_shapes(attachment)))


def _gradients(attachment: Attachment, optimizer: Optimizer, *, far: bool) -> int:
    """Of those that are stepped in the backward pass one is there, in float32, with what its update works in."""
    if far:
        return bytes_of.gradients_under_way(max(each.nbytes for each in attachment.named_parameters().values()))
    if not optimizer.steps_in_backward:
        return bytes_of.gradients(attachment.parameter_count)
    shapes = _shapes(attachment)
    return bytes_of.gradients(max(map(math.prod, shapes.values()))) + optimizer.update_bytes(shapes)


def _shapes(attachment: Attachment) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in attachment.named_parameters().items()}


def _recomputed(recipe: FinetuneRecipe, model: LanguageModel) -> Sequence[int]:
    """How many blocks may be recomputed, as the recipe has it, fewest first. Raises RecipeError for what cannot be."""
    asked, most = recipe.batch.recompute, model.recomputable
    if asked == "auto":
        return range(most + 1)
    count = 0 if asked == "none" else max(most, 1) if asked == "all" else asked
    if count > most:
        why = f"this model has {most} blocks" if most else "the model zoo runs this model's blocks, and keeps them"
        raise RecipeError(f"batch.recompute: {asked!r}, and {why}", allowed=f"auto, none, or 0 to {most}")
    return (count,)


def most_saves(recipe: FinetuneRecipe, data: Prepared, steps: int) -> int:
    """At most so many checkpoints are ever written: those due, one for each evaluation that is the best, the last."""
    every = [recipe.checkpoint.every, recipe.evaluation.every if len(data.held_out) else 0]
    return 1 + sum((steps - 1) // interval for interval in every if interval)


def plan_disk(
    recipe: FinetuneRecipe, data: Prepared, model: LanguageModel, attachment: Attachment, *, saves: int
) -> dict[str, int]:
    """Bytes of one of so many checkpoints and of the result, how many are kept at once, and what is free there.

    The token cache has been written by now: it is in `cache`, and not in `total`.
    """
    tensors, constants = attachment.named_parameters(), attachment.named_constants()
    # Beside what the optimizer keeps: both are written as they are.
    beside = recipe.optimizer.state_bytes(_shapes(attachment)) + sum(each.nbytes for each in constants.values())
    # A trained tensor is there with two of the optimizer's.
    count = len(tensors) + math.ceil(len(constants) / 3)
    one = bytes_of.checkpoint(attachment.parameter_count, beside, tensors=count, rows=len(data.train))
    kept = bytes_of.kept_checkpoints(recipe.checkpoint.keep, saves)
    # Trained base weights are saved as a whole model, whichever of them were trained.
    adapter = sum(tensor.nbytes for tensor in attachment.named_tensors().values())
    result = _weights(model) if attachment.trains_base else adapter
    return {
        "checkpoint": one,
        "kept": kept,
        "result": result,
        "total": one * kept + result,
        "free": free_disk(place_of(recipe)),
        "cache": bytes_of.token_cache(data.store.token_count, len(data.store)),
    }


def notices(memory: Mapping[str, int], disk: Mapping[str, int], speed: Mapping[str, Any]) -> list[str]:
    """What a user should know before the first step: what it costs to fit, and where memory or disk may not suffice."""
    said = []
    if memory["recomputed"]:
        extra = speed["recomputed_flops_per_token"]
        said.append(
            f"memory: the first {memory['recomputed']} of {memory['blocks']} blocks are computed again in the backward "
            f"pass, for {bytes_text(memory['total'])} instead of {bytes_text(memory['without'])} (available: "
            f"{bytes_text(memory['available'])}); that costs {count_text(extra)}FLOP a token more "
            f"(+{percent_text(extra / speed['flops_per_token'])}) and changes no result"
        )
    if memory["total"] > memory["available"]:
        said.append(
            f"memory: about {bytes_text(memory['total'])} are needed ({_biggest(memory)}) and "
            f"{bytes_text(memory['available'])} are available; when it runs out, micro-batches are made smaller"
        )
    if memory["host"]:
        there = bytes_text(free_memory(torch.device("cpu")))
        said.append(f"memory: {bytes_text(memory['host'])} lie in the host's memory, where {there} are free")
    if disk["total"] > disk["free"]:
        said.append(
            f"disk: {bytes_text(disk['total'])} are needed ({disk['kept']} checkpoints of "
            f"{bytes_text(disk['checkpoint'])}, a result of {bytes_text(disk['result'])}) and "
            f"{bytes_text(disk['free'])} are free; lower checkpoint.keep, or set run to another disk"
        )
    return said


def require_disk(disk: Mapping[str, int], folder: Path) -> None:
    """Raise DiskFullError when not even one checkpoint and the result would fit."""
    needed, free = disk["checkpoint"] + disk["result"], free_disk(folder)
    if needed > free:
        raise DiskFullError(
            f"{folder}: {needed:,} bytes needed for one checkpoint and the result, {free:,} free",
            do="free space, or name a run directory on another disk: --run DIR",
        )


@dataclass(frozen=True)
class Pass:
    """The largest micro-batch: its tokens and longest row, what is kept and at work at its widest moment, and what is
    `far`, with the host."""

    kept: int
    working: int
    tokens: int
    longest: int
    far: int = 0

    @property
    def bytes(self) -> int:
        """What the pass needs in all."""
        return self.kept + self.working


def passes_of(
    model: LanguageModel,
    attachment: Attachment,
    batches: Mapping[MicroBatch, Forest],
    recomputed: Iterable[int],
    *,
    pooled: bool,
    far: bool = False,
) -> dict[int, Pass]:
    """For each count of blocks that are recomputed the pass of these that needs most, as this device's memory holds it.

    Of blocks that we run ourselves formulas say what they keep; of the zoo's it is counted.
    """
    formulas = Formulas.of(model, attachment, apart=model.device.type == "cpu" and not pooled, far=far)
    found = {}
    for count in recomputed:
        passes = [formulas.of_pass(batch, each.trained_count, each, count) for batch, each in batches.items()]
        found[count] = max(passes, key=lambda one: one.bytes)
    return found


@dataclass(frozen=True)
class Formulas:
    """What tells the memory of any pass through a model with an adapter on; tensors lie `apart` without the pool, and
    inputs of recomputed blocks may be `far`."""

    model: LanguageModel
    decoder: bytes_of.Decoder
    work: bytes_of.Work
    counted: Counted | None
    apart: bool = False
    far: bool = False

    @classmethod
    def of(
        cls, model: LanguageModel, attachment: Attachment, *, apart: bool = False, far: bool = False,
        device: str | None = None,
    ) -> Formulas:
        """Those of a model as it stands; of the zoo's blocks a few passes are counted.

        Of a model without memory, `device` is the kind it would be on.
        """
        counted = Counted.of(model, attachment) if model.executor.blocks is None else None
        return cls(model, decoder_of(model), work_without(model, attachment, device=device), counted, apart, far)

    def of_pass(
        self, batch: MicroBatch, predicted: int, forest: Forest | Callable[[], Forest], recomputed: int
    ) -> Pass:
        """One pass, with so many blocks recomputed where they can be; the forest is looked at where passes are counted,
        and where attention keeps something for each pair of tokens.
        """
        work = work_with(self.work, self.model, batch, predicted)
        if self.counted is None:
            if work.squares:
                pairs = load_of(self.model, forest if isinstance(forest, Forest) else forest()).texts.pairs
                work = replace(work, squares=work.squares * pairs / (work.tokens * work.longest))
            work = replace(work, recomputed=bytes_of.Recomputed(blocks=recomputed, far=self.far))
            widest = bytes_of.peak(self.decoder, work)
        else:
            widest = self.counted.peak(
                self.model, self.decoder, work, forest if isinstance(forest, Forest) else forest()
            )
        kept, working = (bytes_of.on_heap(each) if self.apart else each for each in (widest.kept, widest.working))
        far = bytes_of.far_inputs(self.decoder, work)
        return Pass(kept=kept, working=working, tokens=work.tokens, longest=work.longest, far=far)


def use_pool(model: LanguageModel) -> str:
    """Take large CPU tensors from the pool from now on, where kernels are C++ anyway; else why not."""
    if model.device.type != "cpu":
        return "the model is on a GPU"
    if not isinstance(model.executor.backend, NativeBackend):
        return "nothing is done in C++ here"
    return pool.install()


def _weights(model: LanguageModel, quantizer: Quantizer | None = None) -> int:
    """Bytes of the base as it is, or as `quantizer` would pack it."""
    parameters = {id(each): each for each in base_parameters(model.module).values()}
    stored = {key: stored_bytes(each) for key, each in parameters.items()}
    for site in packed_sites(model) if quantizer is not None else ():
        size = quantizer.packed_bytes((site.out_features, site.in_features)) if quantizer is not None else None
        stored |= {} if size is None else {id(site.weight_parameter): size}
    # Of packed weights one is unpacked at a time.
    unpacked = max((each.nbytes for key, each in parameters.items() if stored[key] != each.nbytes), default=0)
    return sum(stored.values()) + unpacked


def _biggest(memory: Mapping[str, int]) -> str:
    parts = sorted(((memory[name], name) for name in PARTS), reverse=True)[:3]
    return ", ".join(f"{name} {bytes_text(size)}" for size, name in parts)
