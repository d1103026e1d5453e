"""How fast a run could be at most: the arithmetic of its products on this machine, read off model and adapter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import torch

from luthier.arithmetic.compute import bytes_per_token, flops_per_token, forward_flops, limit, mean_context
from luthier.arithmetic.counted import Texts
from luthier.data.forest import Forest
from luthier.model.editing.attachment import Attachment
from luthier.model.language_model import LanguageModel
from luthier.model.machine import Rates, rates
from luthier.model.tasks import CAUSAL, kind_of
from luthier.recipes.sizing.products import Flow, Stream, recomputed_work, work
from luthier.recipes.sizing.zoo_memory import load_of
from luthier.train.source import DataSource

SAMPLED: Final = 256
"""Rows of a run that tell how much is read, said and predicted, where the lengths of rows do not say it."""


def plan_speed(
    model: LanguageModel,
    attachment: Attachment,
    flow: Flow,
    *,
    at_once: int,
    step_tokens: int,
    recomputed: int = 0,
    looks: float = 0.0,
    machine: Rates | None = None,
) -> dict[str, Any]:
    """FLOPs and bytes a token, this machine's rates, and the tokens a second that they allow.

    `at_once` are the tokens of a micro-batch, and `looks` how many forward passes, those of a reference among them, a
    token costs beside its training. What the first `recomputed` blocks compute again need not be done: it is told
    apart. The rates are those of a `machine`, or of this one for the model.
    """
    linears, attentions = work(model, attachment, flow)
    looked = looks * look_flops(model, attachment, flow)
    flops = flops_per_token(linears, attentions) + looked
    traffic = bytes_per_token(
        linears,
        number=model.dtype.itemsize,
        at_once=min(at_once, step_tokens),
        parameters=attachment.parameter_count,
        step_tokens=step_tokens,
        looks=looks,
    )
    found = machine or rates_for(model, torch.device(model.device))
    return {
        "flops_per_token": flops,
        "looked_flops_per_token": looked,
        "recomputed_flops_per_token": forward_flops(*recomputed_work(model, attachment, flow, recomputed)),
        "bytes_per_token": traffic,
        "flops_per_second": found.flops,
        "bytes_per_second": found.bytes,
        "dtype": str(model.dtype).removeprefix("torch."),
        "tokens_per_second": limit(flops, traffic, flops_per_second=found.flops, bytes_per_second=found.bytes),
    }


def look_flops(model: LanguageModel, attachment: Attachment, flow: Flow) -> float:
    """FLOPs a token in a forward pass of the model without its adapter."""
    linears, attentions = work(model, attachment, flow)
    return float(forward_flops([replace(layer, rank=0) for layer in linears], attentions))


def flow_of(model: LanguageModel, source: DataSource, share: float) -> Flow:
    """Where the tokens of a run go; `share` is the part of its rows' tokens that carries weight."""
    if model.task == CAUSAL and source.objective.meanings is None:
        return Flow(texts=Stream(context=mean_context(source.lengths.tolist())), predicted=share)
    return flow_through(model, Forest(tuple(tree for trees in source.first_rows(SAMPLED) for tree in trees)))


def looks_of(source: DataSource) -> float:
    """Forward passes that a token costs beside its training: a reference's, and both policies' over probes."""
    objective = source.objective
    trees = [tree for each in source.first_rows(SAMPLED) for tree in each]
    probed = sum(tree.token_count for tree in objective.probes(trees)) / sum(tree.token_count for tree in trees)
    return objective.reference + 2 * probed


def flow_through(model: LanguageModel, forest: Forest) -> Flow:
    """Where the tokens of a forest go."""
    load, total = load_of(model, forest), forest.token_count
    texts, answers = load.texts, load.answers
    pairs = texts.pairs if kind_of(model.config) != "causal" else _left_to_right(texts)
    return Flow(
        texts=Stream(share=texts.tokens / total, context=pairs / texts.tokens),
        answers=Stream(
            share=answers.tokens / total,
            context=_left_to_right(answers) / max(1, answers.tokens),
            reads=load.crossed / max(1, answers.tokens),
        ),
        predicted=load.predicted / total,
    )


def _left_to_right(texts: Texts) -> float:
    """The pairs whose key does not come after its query; keys from before a text are seen by all of it."""
    return texts.pairs - (texts.squares - texts.tokens) / 2


def rates_for(model: LanguageModel, device: torch.device) -> Rates:
    """The rates of a device here for the widest product of a block, in the precision of the model."""
    layers = [site for site in model.sites.linear() if site.in_features and site.out_features]
    widest = max(layers, key=lambda site: site.in_features * site.out_features, default=None)
    inputs, outputs = (widest.in_features, widest.out_features) if widest else (512, 512)
    return rates(device, model.dtype, inputs=inputs, outputs=outputs)
