"""How fast a run could be at most: the arithmetic of its products on this machine, read off model and adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from luthier.arithmetic.compute import (
    Attention,
    Linear,
    bytes_per_token,
    flops_per_token,
    forward_flops,
    limit,
    mean_context,
)
from luthier.model.attachment import Attachment
from luthier.model.edits import LearnedPrompt, SiteEdit, TrainedParameters
from luthier.model.language_model import LanguageModel
from luthier.model.machine import Rates, rates
from luthier.model.sites import Site

_ORDER = ({"q", "k", "v"}, {"o"}, {"gate", "up", "linear"}, {"down"})
"""The linear layers of a block in the order in which a token passes them; those of one group see the same input."""


def plan_speed(
    model: LanguageModel,
    attachment: Attachment,
    lengths: Sequence[int],
    *,
    share: float,
    at_once: int,
    step_tokens: int,
    recomputed: int = 0,
) -> dict[str, Any]:
    """FLOPs and bytes a token, this machine's rates, and the tokens a second that they allow.

    `lengths` are those of the training rows, `share` is the part of their tokens that is predicted, `at_once` the
    tokens of a micro-batch. What the first `recomputed` blocks compute again need not be done: it is told apart.
    """
    context = mean_context(lengths)
    linears, attentions = work(model, attachment, context=context, share=share)
    flops = flops_per_token(linears, attentions)
    traffic = bytes_per_token(
        linears,
        number=model.dtype.itemsize,
        at_once=min(at_once, step_tokens),
        parameters=attachment.parameter_count,
        step_tokens=step_tokens,
    )
    found = _rates_of(model)
    return {
        "flops_per_token": flops,
        "recomputed_flops_per_token": forward_flops(*_blocks(model, attachment, recomputed, context=context)[:2]),
        "bytes_per_token": traffic,
        "flops_per_second": found.flops,
        "bytes_per_second": found.bytes,
        "dtype": str(model.dtype).removeprefix("torch."),
        "tokens_per_second": limit(flops, traffic, flops_per_second=found.flops, bytes_per_second=found.bytes),
    }


def work(
    model: LanguageModel, attachment: Attachment, *, context: float, share: float
) -> tuple[list[Linear], list[Attention]]:
    """The products that a token passes, from the embedding up, and what of each needs a gradient."""
    linears, attentions, flowing = _blocks(model, attachment, model.sites.layers, context=context)
    head = [_linear(site, _touched(attachment), below=flowing, share=share) for site in model.sites.role("head")]
    return [*linears, *head], attentions


def _blocks(
    model: LanguageModel, attachment: Attachment, layers: int, *, context: float
) -> tuple[list[Linear], list[Attention], bool]:
    """The products of the first `layers` blocks, and whether what comes after them needs a gradient of its input."""
    touched = _touched(attachment)
    sites, width = model.sites, model.sites.heads * model.sites.head_size
    # A prompt is learned below all products, keys and values beside those of a layer.
    flowing = isinstance(attachment.root, LearnedPrompt)
    flowing = flowing or any(_is_touched(site, touched) for site in sites.role("embed"))
    linears: list[Linear] = []
    attentions: list[Attention] = []
    for layer in range(layers):
        own = [site for site in sites if site.layer == layer]
        flowing = flowing or any(_is_touched(site, touched) for site in own if "norm" in site.roles)
        for group in _groups(own):
            linears += [_linear(site, touched, below=flowing) for site in group]
            flowing = flowing or any(_is_touched(site, touched) for site in group)
            if width and any("v" in site.roles for site in group):
                flowing = flowing or attachment.root is not None
                attentions.append(Attention(width=width, context=context, below=flowing))
        flowing = flowing or any(_is_touched(site, touched) for site in own if "feed" in site.roles)
    return linears, attentions, flowing


def _groups(sites: Sequence[Site]) -> Iterator[list[Site]]:
    """The linear sites of a block, by what they see."""
    for roles in _ORDER:
        found = [site for site in sites if site.is_linear and "head" not in site.roles and site.roles[0] in roles]
        if found:
            yield found


def _touched(attachment: Attachment) -> Mapping[str, int | None]:
    """Where something is trained, by name: the rank of a low-rank term, 0 for another edit, None for the weights."""
    found: dict[str, int | None] = {}
    for edit in attachment.edits:
        if isinstance(edit, TrainedParameters):
            found[edit.site_name] = None
        elif isinstance(edit, SiteEdit):
            term = edit.low_rank()
            found[edit.site_name] = 0 if term is None else len(term.down)
    return found


def _is_touched(site: Site, touched: Mapping[str, int | None]) -> bool:
    # What trains a block trains everything in it.
    return any(site.name == name or site.name.startswith(f"{name}.") for name in touched)


def _linear(site: Site, touched: Mapping[str, int | None], *, below: bool, share: float = 1.0) -> Linear:
    trained = any(
        rank is None and (site.name == name or site.name.startswith(f"{name}.")) for name, rank in touched.items()
    )
    return Linear(
        inputs=site.in_features,
        outputs=site.out_features,
        rank=touched.get(site.name) or 0,
        trained=trained,
        below=below,
        share=share,
    )


def _rates_of(model: LanguageModel) -> Rates:
    """This machine's rates for the widest product of a block, in the precision of the model."""
    layers = [site for site in model.sites.linear() if site.in_features and site.out_features]
    widest = max(layers, key=lambda site: site.in_features * site.out_features, default=None)
    inputs, outputs = (widest.in_features, widest.out_features) if widest else (512, 512)
    return rates(torch.device(model.device), model.dtype, inputs=inputs, outputs=outputs)
