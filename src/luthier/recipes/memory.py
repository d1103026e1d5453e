"""Memory and disk of a run, before it starts: the formulas of `arithmetic/` with a model's and a data set's sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from luthier.arithmetic import memory as bytes_of
from luthier.arithmetic.memory import Decoder, Work
from luthier.core.errors import DiskFullError
from luthier.core.units import bytes_text
from luthier.data.prepare import Prepared
from luthier.kernels.backend import Seen
from luthier.model.attachment import Attachment
from luthier.model.edits import SiteEdit, TrainedParameters, base_parameters
from luthier.model.language_model import LanguageModel
from luthier.recipes.files import place_of
from luthier.recipes.room import free_disk, free_memory
from luthier.recipes.schema import FinetuneRecipe
from luthier.train.source import DataSource, MicroBatch

PARTS = ("weights", "trained", "gradients", "optimizer", "activations", "head", "saving")
"""What memory is needed for, as a plan names it."""


def plan_memory(
    recipe: FinetuneRecipe,
    data: Prepared,
    model: LanguageModel,
    attachment: Attachment,
    source: DataSource,
    steps: int,
) -> dict[str, int]:
    """Bytes at the peak of the run, by part, with `total` and what is `available` to this process (weights included).

    `tokens` and `longest` are those of the largest micro-batch, from the lengths of the rows.
    """
    trained = attachment.named_parameters().values()
    optimizer = int(recipe.optimizer.bytes_per_parameter() * attachment.parameter_count)
    weights = _weights(model)
    copies = sum(p.nbytes + bytes_of.masters(p.numel(), p.element_size()) for p in trained)
    share = data.store.trained_count / max(1, data.store.token_count)
    batches = source.largest_micro_batches(recipe.batch.micro_tokens, steps)
    activations, head, largest = max(peak_of(model, attachment, batch, share) for batch in batches)
    on_host = model.device.type == "cpu"
    parts = {
        # Of base weights that are trained the originals are kept aside, so they count in both.
        "weights": weights,
        "trained": copies,
        "gradients": bytes_of.gradients(attachment.parameter_count),
        "optimizer": optimizer,
        "activations": activations,
        "head": head,
        # The copy that a checkpoint is written from lies on the host, wherever the model is.
        "saving": bytes_of.staging(attachment.parameter_count, optimizer) if on_host else 0,
    }
    return {
        **parts,
        "total": sum(parts.values()),
        "available": free_memory(model.device) + weights + copies,
        "tokens": largest[0],
        "longest": largest[1],
    }


def plan_disk(
    recipe: FinetuneRecipe, data: Prepared, model: LanguageModel, attachment: Attachment, steps: int
) -> dict[str, int]:
    """Bytes of one checkpoint and of the result, how many checkpoints are kept at once, and what is free there.

    The token cache has been written by now: it is in `cache`, and not in `total`.
    """
    tensors = attachment.named_parameters()
    optimizer = int(recipe.optimizer.bytes_per_parameter() * attachment.parameter_count)
    one = bytes_of.checkpoint(attachment.parameter_count, optimizer, tensors=len(tensors), rows=len(data.train))
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


def notices(memory: Mapping[str, int], disk: Mapping[str, int]) -> list[str]:
    """What a user should know before the first step: where memory or disk may not suffice."""
    said = []
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


def peak_of(
    model: LanguageModel, attachment: Attachment, batch: MicroBatch, share: float
) -> tuple[int, int, tuple[int, int]]:
    """Activations and head of one micro-batch, of whose tokens a `share` is predicted; its tokens and longest row."""
    # Unrolled rows are padded to the longest.
    tokens = batch.tokens if model.executor.kind == "segments" else len(batch.indices) * batch.longest
    decoder = decoder_of(model)
    work = Work(
        tokens=tokens,
        predicted=max(1, math.ceil(share * batch.tokens)),
        longest=batch.longest,
        edited=_edited(model, attachment),
        trains_base=attachment.trains_base,
        squares=_squares(model, decoder),
        masked=_masks_a_root(model),
        fused=_runs_fused(model),
        ranks=_ranks(model, attachment),
    )
    live = bytes_of.activations(decoder, work)
    kept = bytes_of.on_heap(live, work) if model.device.type == "cpu" else live
    return kept, bytes_of.head(decoder, work), (batch.tokens, batch.longest)


def _weights(model: LanguageModel) -> int:
    return sum(each.nbytes for each in {id(each): each for each in base_parameters(model.module).values()}.values())


def _edited(model: LanguageModel, attachment: Attachment) -> float:
    """The share of linear layers that are edited or trained."""
    linear = {site.name for site in model.sites.linear()}
    touched = {edit.site_name for edit in attachment.edits if isinstance(edit, (SiteEdit, TrainedParameters))}
    # A block that is trained trains all linear layers in it.
    edited = [name for name in linear if any(name == one or name.startswith(f"{one}.") for one in touched)]
    return len(edited) / len(linear) if linear else 0.0


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

