"""The sizes of a model and of what is trained in it, as the formulas of `arithmetic/memory.py` want them."""

from __future__ import annotations

from dataclasses import replace

import torch

from luthier.arithmetic.memory import Decoder, Ours, Output, Work
from luthier.kernels.backend import Seen
from luthier.kernels.head import Head
from luthier.kernels.torch_backend import TorchBackend
from luthier.model.editing.attachment import Attachment
from luthier.model.editing.edits import SiteEdit, TrainedParameters
from luthier.model.editing.sites import Site
from luthier.model.language_model import LanguageModel
from luthier.model.running.block_parts import HEAD_NORMS, dropout_of
from luthier.model.running.zoo_head import FeatureHead
from luthier.train.source import MicroBatch


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
        vocabulary=len(model.task.classes) or model.vocabulary_size,
        gated=bool(sites.role("gate")),
        bytes=torch.finfo(model.dtype).bits // 8,
        normed_heads=any(name.endswith(f".{HEAD_NORMS[0]}") for name, _ in model.module.named_modules()),
    )


def work_of(model: LanguageModel, attachment: Attachment, batch: MicroBatch, predicted: int) -> Work:
    """What one micro-batch, with so many tokens or classes that are `predicted`, is for the formulas."""
    return work_with(work_without(model, attachment), model, batch, predicted)


def work_with(work: Work, model: LanguageModel, batch: MicroBatch, predicted: int) -> Work:
    """The same for another micro-batch."""
    # Unrolled rows are padded to the longest.
    tokens = batch.tokens if model.executor.kind == "segments" else len(batch.indices) * batch.longest
    return replace(work, tokens=tokens, predicted=max(1, predicted), longest=batch.longest)


def work_without(model: LanguageModel, attachment: Attachment, *, device: str | None = None) -> Work:
    """What is trained, for the formulas, before it is known on which tokens.

    Of a model without memory, `device` is the kind it would be on.
    """
    head = model.head
    plain = head.plain if isinstance(head, FeatureHead) else head
    decoder, ours = decoder_of(model), _ours(model)
    wide = 4 // decoder.bytes
    drops = (device or model.device.type) == "cpu" and any(map(dropout_of, model.module.modules()))
    return Work(
        tokens=0,
        predicted=1,
        longest=0,
        # Torch has no kernel for a CPU that drops weights of attention without n x n tensors: it keeps three of them in
        # float32, and of bfloat16 also what they were made from.
        edits=_edits(model, attachment, ours) + wide * wide * decoder.query * drops,
        untouched=_untouched(model, attachment),
        trains_base=attachment.trains_base,
        squares=3 * wide if drops else _squares(model, decoder),
        masked=_masks_a_root(model, ours),
        ours=ours,
        output=_output(model, plain) if isinstance(plain, Head) else Output(tied=model.sites.tied),
    )


def _output(model: LanguageModel, head: Head) -> Output:
    return Output(
        in_place=not isinstance(head.backend, TorchBackend),
        rows=sum(len(change.ids) for change in head.changes),
        wide=head.bias is not None or head.cap is not None or head.scale != 1.0,
        tied=model.sites.tied,
        own_norm=model.executor.blocks is not None,
    )


def _edits(model: LanguageModel, attachment: Attachment, ours: Ours) -> float:
    """Numbers that edits and trained layers keep of a token, the mean over blocks; an input of several counts once.

    In what is `ours` of a block only a low-rank term keeps anything: what it is in the middle.
    """
    sites = {site.name: site for site in model.sites if site.layer is not None}
    inputs: dict[tuple[int | None, str], int] = {}
    own = 0
    for edit in attachment.edits:
        if isinstance(edit, TrainedParameters):
            # A block that is trained trains all linear layers in it.
            below = [site for site in sites.values() if f"{site.name}.".startswith(f"{edit.site_name}.")]
            inputs.update({_reads(site): site.in_features for site in below if site.is_linear and not _is(ours, site)})
        elif isinstance(edit, SiteEdit) and edit.site_name in sites:
            site, kept = sites[edit.site_name], edit.keeps()
            if _is(ours, site):
                term = edit.low_rank()
                own += 0 if term is None else len(term.down)
                continue
            if kept.input:
                inputs[_reads(site)] = site.in_features or model.sites.hidden
            own += kept.own + kept.output * (site.out_features or model.sites.hidden)
    return (own + sum(inputs.values())) / max(1, model.sites.layers)


def _is(ours: Ours, site: Site) -> bool:
    """Whether a layer lies in a half of its block that our operations run."""
    return ours.feed_forward if {"gate", "up", "down", "feed"} & set(site.roles) else ours.attention


def edits_inner(model: LanguageModel, attachment: Attachment) -> bool:
    """Whether edits work on what goes into the way down of a feed-forward."""
    down = {site.name for site in model.sites.role("down")}
    edits = [edit for edit in attachment.edits if isinstance(edit, SiteEdit) and edit.site_name in down]
    return any(edit.keeps().input for edit in edits)


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


def _ours(model: LanguageModel) -> Ours:
    """Which halves of all blocks our operations run in training, dropout considered."""
    blocks = model.executor.blocks
    if blocks is None:
        return Ours()
    was_training = model.module.training
    model.train()
    try:
        attention, feed_forward = blocks.taken
    finally:
        model.train(was_training)
    return Ours(attention=attention, feed_forward=feed_forward)


def _masks_a_root(model: LanguageModel, ours: Ours) -> bool:
    """Whether a learned root makes attention build a mask for each row: not where the backend takes it as it is."""
    if model.active_root is None:
        return False
    if not ours.everything:
        return True
    query = torch.empty(1, model.sites.heads, model.sites.head_size, dtype=model.dtype, device=model.device)
    return not model.executor.backend.attends(query, Seen((((0, 1),),), outside=1))


def _squares(model: LanguageModel, decoder: Decoder) -> int:
    """How many n x n tensors attention keeps for each head: none where it is flash attention."""
    config = model.module.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None):
        return 3
    # On a GPU, torch has no kernel without n x n for float32 with grouped heads.
    grouped = decoder.key_value != decoder.query
    return 2 if model.device.type == "cuda" and model.dtype == torch.float32 and grouped else 0
