"""Memory and disk of a run, before it starts: the formulas of `arithmetic/` with a model's and a data set's sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from luthier.arithmetic import memory as bytes_of
from luthier.arithmetic.memory import Decoder, Output, Work
from luthier.core.errors import DiskFullError, RecipeError
from luthier.core.units import bytes_text, count_text, percent_text
from luthier.data.prepare import Prepared
from luthier.kernels import pool
from luthier.kernels.backend import Seen
from luthier.kernels.head import Head
from luthier.kernels.native_backend import NativeBackend
from luthier.kernels.torch_backend import TorchBackend
from luthier.model.attachment import Attachment
from luthier.model.edits import SiteEdit, TrainedParameters, base_parameters
from luthier.model.language_model import LanguageModel
from luthier.model.packed import stored_bytes
from luthier.model.sites import Site
from luthier.optimizers import Optimizer
from luthier.recipes.files import place_of
from luthier.recipes.room import free_disk, free_memory
from luthier.recipes.schema import FinetuneRecipe
from luthier.train.source import DataSource, MicroBatch

PARTS = ("weights", "trained", "gradients", "optimizer", "activations", "working", "libraries", "saving")
"""What memory is needed for, as a plan names it: activations are kept for a backward pass, others are at work."""


def plan_memory(
    recipe: FinetuneRecipe,
    data: Prepared,
    model: LanguageModel,
    attachment: Attachment,
    source: DataSource,
    steps: int,
    *,
    pooled: bool,
) -> dict[str, int]:
    """Bytes at the peak of the run, by part, with `total` and what is `available` to this process (weights included).

    `tokens` and `longest` are those of the largest micro-batch, from the lengths of the rows. `recomputed` is how many
    blocks are recomputed, by the recipe or because it takes so many to fit; `without` is the total if none were.
    """
    share = data.store.trained_count / max(1, data.store.token_count)
    works = [
        work_of(model, attachment, batch, share)
        for batch in source.largest_micro_batches(recipe.batch.micro_tokens, steps)
    ]
    parts = lasting(model, attachment, recipe.optimizer)
    if model.device.type == "cpu":
        # The copy that a checkpoint is written from lies on the host, wherever the model is.
        parts["saving"] = bytes_of.staging(attachment.parameter_count, parts["optimizer"])
    available = free_memory(model.device) + parts["weights"] + parts["trained"]
    room = available - sum(parts.values())
    tried = _recomputed(recipe, model)
    passes = {count: largest_pass(model, works, count, pooled=pooled) for count in (*tried, 0)}
    # As few as fit; if none do, as few as save most.
    least = min(tried, key=lambda count: passes[count].bytes)
    count = next((count for count in tried if passes[count].bytes <= room), least)
    needed = {**parts, "activations": passes[count].kept, "working": passes[count].working}
    return {
        **{name: needed[name] for name in PARTS},
        "total": sum(needed.values()),
        "available": available,
        "tokens": passes[count].tokens,
        "longest": passes[count].longest,
        "recomputed": count,
        "blocks": model.sites.layers,
        "without": sum(parts.values()) + passes[0].bytes,
    }


def lasting(model: LanguageModel, attachment: Attachment, optimizer: Optimizer) -> dict[str, int]:
    """Bytes that stay from step to step, by part; no checkpoint is being written."""
    trained = attachment.named_parameters().values()
    found = sum(constant.nbytes for constant in attachment.named_constants().values())
    return {
        # Of base weights that are trained the originals are kept aside, so they count in both.
        "weights": _weights(model),
        "trained": found + sum(p.nbytes + bytes_of.masters(p.numel(), p.element_size()) for p in trained),
        "gradients": _gradients(attachment, optimizer),
        "optimizer": optimizer.resident_bytes(_shapes(attachment)),
        "libraries": bytes_of.libraries(model.dtype.itemsize) if model.device.type == "cpu" else 0,
        "saving": 0,
    }


def _gradients(attachment: Attachment, optimizer: Optimizer) -> int:
    """Of those that are stepped in the backward pass one is there, in float32, with what its update works in."""
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


def plan_disk(
    recipe: FinetuneRecipe, data: Prepared, model: LanguageModel, attachment: Attachment, steps: int
) -> dict[str, int]:
    """Bytes of one checkpoint and of the result, how many checkpoints are kept at once, and what is free there.

    The token cache has been written by now: it is in `cache`, and not in `total`.
    """
    tensors, constants = attachment.named_parameters(), attachment.named_constants()
    # Beside what the optimizer keeps: both are written as they are.
    beside = recipe.optimizer.state_bytes(_shapes(attachment)) + sum(each.nbytes for each in constants.values())
    # A trained tensor is there with two of the optimizer's.
    count = len(tensors) + math.ceil(len(constants) / 3)
    one = bytes_of.checkpoint(attachment.parameter_count, beside, tensors=count, rows=len(data.train))
    kept = bytes_of.kept_checkpoints(recipe.checkpoint.keep, _saves(recipe, steps))
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


def decoder_of(model: LanguageModel) -> Decoder:
    """The sizes of a model, read off its sites."""
    sites = model.sites
    down = [site.in_features for site in sites.role("down")]
    config = model.module.config.get_text_config()
    return Decoder(
        layers=sites.layers,
        hidden=sites.hidden,
        inner=max(down) if down else int(getattr(config, "intermediate_size", None) or 4 * sites.hidden),
        query=sites.heads * sites.head_size,
        key_value=sites.key_value_heads * sites.head_size,
        heads=sites.heads,
        vocabulary=model.vocabulary_size,
        gated=bool(sites.role("gate")),
        bytes=torch.finfo(model.dtype).bits // 8,
    )


@dataclass(frozen=True)
class Pass:
    """The largest micro-batch: its tokens and longest row, and what is kept and at work at its widest moment."""

    kept: int
    working: int
    tokens: int
    longest: int

    @property
    def bytes(self) -> int:
        """What the pass needs in all."""
        return self.kept + self.working


def use_pool(model: LanguageModel) -> str:
    """Take large CPU tensors from the pool from now on, where kernels are C++ anyway; else why not."""
    if model.device.type != "cpu":
        return "the model is on a GPU"
    if not isinstance(model.executor.backend, NativeBackend):
        return "nothing is done in C++ here"
    return pool.install()


def largest_pass(model: LanguageModel, works: Sequence[Work], recomputed: int, *, pooled: bool) -> Pass:
    """The pass that needs most of these, with so many blocks recomputed, as this device's memory holds it."""
    decoder, found = decoder_of(model), []
    for work in works:
        widest = bytes_of.peak(decoder, replace(work, recomputed=recomputed))
        kept, working = widest.kept, widest.working
        if model.device.type == "cpu" and not pooled:
            kept, working = bytes_of.on_heap(kept), bytes_of.on_heap(working)
        found.append(Pass(kept=kept, working=working, tokens=work.tokens, longest=work.longest))
    return max(found, key=lambda one: one.bytes)


def work_of(model: LanguageModel, attachment: Attachment, batch: MicroBatch, share: float) -> Work:
    """What one micro-batch, of whose tokens a `share` is predicted, is for the formulas."""
    head = model.head
    return Work(
        # Unrolled rows are padded to the longest.
        tokens=batch.tokens if model.executor.kind == "segments" else len(batch.indices) * batch.longest,
        predicted=max(1, math.ceil(share * batch.tokens)),
        longest=batch.longest,
        edits=_edits(model, attachment),
        untouched=_untouched(model, attachment),
        trains_base=attachment.trains_base,
        squares=_squares(model, decoder_of(model)),
        masked=_masks_a_root(model),
        fused=_runs_fused(model),
        ranks=_ranks(model, attachment),
        output=Output(
            in_place=isinstance(head, Head) and not isinstance(head.backend, TorchBackend),
            rows=sum(len(change.ids) for change in head.changes) if isinstance(head, Head) else 0,
            tied=model.sites.tied,
            own_norm=model.executor.blocks is not None,
        ),
    )


def _weights(model: LanguageModel) -> int:
    parameters = {id(each): each for each in base_parameters(model.module).values()}.values()
    # Of packed weights one is unpacked at a time.
    unpacked = max((each.nbytes for each in parameters if stored_bytes(each) != each.nbytes), default=0)
    return sum(map(stored_bytes, parameters)) + unpacked


def _edits(model: LanguageModel, attachment: Attachment) -> float:
    """Numbers that edits and trained layers keep of a token, the mean over blocks; an input of several counts once."""
    sites = {site.name: site for site in model.sites if site.layer is not None}
    inputs: dict[tuple[int | None, str], int] = {}
    own = 0
    for edit in attachment.edits:
        if isinstance(edit, TrainedParameters):
            # A block that is trained trains all linear layers in it.
            below = [site for site in sites.values() if f"{site.name}.".startswith(f"{edit.site_name}.")]
            inputs.update({_reads(site): site.in_features for site in below if site.is_linear})
        elif isinstance(edit, SiteEdit) and edit.site_name in sites:
            site, kept = sites[edit.site_name], edit.keeps()
            if kept.input:
                inputs[_reads(site)] = site.in_features or model.sites.hidden
            own += kept.own + kept.output * (site.out_features or model.sites.hidden)
    return (own + sum(inputs.values())) / max(1, model.sites.layers)


def _untouched(model: LanguageModel, attachment: Attachment) -> int:
    """How many of the first blocks lie below everything that is trained; their insides need no backward pass."""
    sites = {site.name: site for site in model.sites}
    lowest = model.sites.layers
    for edit in attachment.edits:
        site = sites.get(edit.site_name) if isinstance(edit, (SiteEdit, TrainedParameters)) else None
        if site is None or (site.layer is None and "embed" in site.roles):
            return 0
        if site.layer is not None:
            # What changes the end of a block leaves its inside below it.
            lowest = min(lowest, site.layer + bool({"down", "feed"} & set(site.roles)))
    return lowest


def _reads(site: Site) -> tuple[int | None, str]:
    """What a site reads, as a name that is the same for sites that read the same tensor."""
    for name, roles in (("attention", {"q", "k", "v"}), ("feed-forward", {"gate", "up", "feed"})):
        if roles & set(site.roles):
            return site.layer, name
    return site.layer, site.name


def _runs_fused(model: LanguageModel) -> bool:
    """Whether our operations run all blocks in training, dropout considered."""
    blocks = model.executor.blocks
    if blocks is None:
        return False
    was_training = model.module.training
    model.train()
    try:
        return blocks.take_everything
    finally:
        model.train(was_training)


def _masks_a_root(model: LanguageModel) -> bool:
    """Whether a learned root makes attention build a mask for each row: not where the backend takes it as it is."""
    if model.active_root is None:
        return False
    if not _runs_fused(model):
        return True
    query = torch.empty(1, model.sites.heads, model.sites.head_size, dtype=model.dtype, device=model.device)
    return not model.executor.backend.attends(query, Seen((((0, 1),),), outside=1))


def _ranks(model: LanguageModel, attachment: Attachment) -> int:
    """The sum of the ranks of one block's adapters, the mean over blocks."""
    terms = [edit.low_rank() for edit in attachment.edits if isinstance(edit, SiteEdit)]
    return sum(len(term.down) for term in terms if term is not None) // max(1, model.sites.layers)


def _squares(model: LanguageModel, decoder: Decoder) -> int:
    """How many n x n tensors attention keeps for each head: none where it is flash attention."""
    config = model.module.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None):
        return 3
    # On a GPU, torch has no kernel without n x n for float32 with grouped heads.
    grouped = decoder.key_value != decoder.query
    return 2 if model.device.type == "cuda" and model.dtype == torch.float32 and grouped else 0


def _saves(recipe: FinetuneRecipe, steps: int) -> int:
    """At most so many checkpoints are ever written: the due ones, and one for each evaluation that is the best."""
    every = [interval for interval in (recipe.checkpoint.every, recipe.evaluation.every) if interval]
    return 1 + sum(steps // interval for interval in every)


def _biggest(memory: Mapping[str, int]) -> str:
    parts = sorted(((memory[name], name) for name in PARTS), reverse=True)[:3]
    return ", ".join(f"{name} {bytes_text(size)}" for size, name in parts)
