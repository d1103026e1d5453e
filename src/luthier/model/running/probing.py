"""Probing: which executor reproduces the zoo's own forward, found out with a few tokens when a model is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from luthier.core.errors import RecipeError, UndrivableAttentionError
from luthier.data.forest import Forest, Segment, Span, Tree
from luthier.kernels.backend import Backend
from luthier.model.attending.attention import NAME, ForestPlan
from luthier.model.attending.block_mask import MaskedAttention, MaskedCall, plain_attention
from luthier.model.attending.kept import AttentionCall
from luthier.model.running.blocks import Blocks
from luthier.model.running.executor import Executor, flat_hidden, run_segments
from luthier.model.running.head import head_of
from luthier.model.running.scoring import AnyHead
from luthier.model.running.unrolled import paths, run_unrolled
from luthier.model.zoo import ZooModule

PROBE_TOLERANCE = 2e-2
"""Largest difference of a log-probability between executors that rounding in bfloat16 explains."""
FLOAT32_TOLERANCE = 1e-3
"""The same in float32. Where texts were mixed up in a tiny model, less than the other showed."""


@torch.no_grad()
def probe(module: ZooModule, backend: Backend, *, fused: bool) -> Executor:
    """Find out, with six tokens in two trees, which executor reproduces the zoo's own forward.

    Without `fused` the zoo's modules run one by one. Of a model without memory the shape of its modules decides.
    """
    if module.device.type == "meta":
        return _by_shape(module, backend, fused=fused)
    size = int(module.get_input_embeddings().weight.shape[0])  # type: ignore[union-attr, index]
    ids = (np.arange(6) * 7 + 3).astype(np.int32) % size
    ones = np.ones(3, dtype=np.float32)
    shared = Tree((Segment(ids[:2], ones[:2]), Segment(ids[2:4], ones[:2], 0), Segment(ids[4:], ones[:2], 0)))
    forest = Forest((shared, Tree((Segment(ids[:3], ones),))))
    truth = _plain_log_probs(module, forest)
    own_head = True
    try:
        own_head = close(run_unrolled(module, forest, head=head_of(module)).log_probs, truth, module.dtype)
    except RecipeError:
        own_head = False
    head: AnyHead = replace(head_of(module), backend=backend) if own_head else None
    if not own_head and not close(run_unrolled(module, forest, head=None).log_probs, truth, module.dtype):
        raise RecipeError(
            f"{type(module).__name__}: hidden states and output layer do not reproduce the model's own logits",
            do="report the model type; it cannot be trained with this version",
        )
    reason = _segments_fail(module, forest, head, truth)
    if reason:
        return Executor("unrolled", own_head, backend, reason)
    blocks = Blocks.of(module, attention_calls(module), backend) if fused else None
    if blocks is not None:
        ours = run_segments(module, forest, head=head, blocks=blocks).log_probs
        blocks = blocks if close(ours, truth, module.dtype) else None
    reasons = [] if own_head else ["the output head is computed by the zoo"]
    by_mask, failure = _by_mask(module, forest, head, truth, blocks) if fused else (None, "")
    reasons += [f"attention by segment, not by mask: {failure}"] if failure else []
    return Executor("segments", own_head, backend, "; ".join(reasons), blocks, by_mask)


def _by_shape(module: ZooModule, backend: Backend, *, fused: bool) -> Executor:
    """What would run a model whose weights are not there, if it computes what its modules promise."""
    try:
        head: AnyHead = replace(head_of(module), backend=backend)
    except RecipeError:
        head = None
    try:
        calls = attention_calls(module)
    except (UndrivableAttentionError, TypeError, ValueError, RuntimeError, AttributeError, KeyError) as failure:
        return Executor("unrolled", head is not None, backend, f"{type(failure).__name__}: {failure}"[:200])
    if not calls:
        return Executor("unrolled", head is not None, backend, "the model does not support the attention interface")
    blocks = Blocks.of(module, calls, backend) if fused else None
    return Executor("segments", head is not None, backend, "", blocks)


def _by_mask(
    module: ZooModule, forest: Forest, head: AnyHead, truth: Tensor, blocks: Blocks | None
) -> tuple[MaskedAttention | None, str]:
    """Attention by mask, where it is of use and does what it should; or None, with the reason when it does not."""
    if not _may_mask(module, blocks):
        return None, ""
    by_mask = MaskedAttention.compiled()
    calls: list[MaskedCall] = []
    try:
        log_probs = run_segments(module, forest, head=head, blocks=blocks, by_mask=by_mask.noting(calls)).log_probs
        # Now, and not at the first step: the backward pass is compiled too.
        slopes = all(by_mask.has_the_slopes_of(MaskedAttention(plain_attention), call) for call in calls)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, NotImplementedError, OSError) as failure:
        return None, f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
    if not close(log_probs, truth, module.dtype):
        return None, "it does not reproduce the model's own logits"
    if not slopes:
        return None, "its gradients are not those of plain attention"
    return (by_mask, "") if calls else (None, "")


def _may_mask(module: ZooModule, blocks: Blocks | None) -> bool:
    """Whether this is a GPU, and the backend has no attention of its own for every layer: then compiling is in vain."""
    if module.device.type != "cuda" or blocks is None:
        return module.device.type == "cuda"
    query = torch.empty(1, 1, blocks.head_size, dtype=module.dtype, device=module.device)
    return not blocks.backend.attends(query, None) or any(call.window is not None for call in blocks.calls.values())


def attention_calls(module: ZooModule) -> Mapping[int, AttentionCall]:
    """How each layer of the zoo calls its attention, from a text of one token."""
    plan = ForestPlan(spans=(Span(0, 1, ()),))
    zero = torch.zeros(1, dtype=torch.int64, device=module.device)
    flat_hidden(module, zero, zero, plan)
    return plan.noted


def _segments_fail(module: ZooModule, forest: Forest, head: AnyHead, truth: Tensor) -> str:
    """Why the by-segment executor cannot run this model; empty when it can."""
    if module.config._attn_implementation != NAME:
        return "the model does not support the attention interface"
    try:
        log_probs = run_segments(module, forest, head=head).log_probs
    except (UndrivableAttentionError, TypeError, ValueError, RuntimeError, AttributeError, KeyError) as failure:
        return f"{type(failure).__name__}: {failure}"[:200]
    return "" if close(log_probs, truth, module.dtype) else "segments do not reproduce the model's own logits"


def _plain_log_probs(module: ZooModule, forest: Forest) -> Tensor:
    """The zoo's own log-probabilities, one path at a time."""
    rows, order = paths(forest)
    found = []
    for row in rows:
        ids = torch.from_numpy(row.segments[0].tokens.astype(np.int64)).to(module.device)
        log_probs = torch.log_softmax(module(input_ids=ids[None], use_cache=False).logits[0].float(), -1)
        kept = torch.from_numpy(np.flatnonzero(row.segments[0].weights[1:])).to(module.device)
        found.append(log_probs[kept].gather(1, ids[kept + 1, None])[:, 0])
    return torch.cat(found)[torch.from_numpy(np.argsort(order, kind="stable")).to(module.device)]


def close(left: Tensor, right: Tensor, dtype: torch.dtype) -> bool:
    """Whether two ways to the same log-probabilities agree, up to rounding in the precision of the model."""
    return apart(left, right) <= tolerance(dtype)


def tolerance(dtype: torch.dtype) -> float:
    """The largest difference that rounding in a precision explains."""
    return FLOAT32_TOLERANCE if dtype == torch.float32 else PROBE_TOLERANCE


def apart(left: Tensor, right: Tensor) -> float:
    """How far two ways to the same log-probabilities are apart, as a share of the largest, where that is above 1."""
    if not bool(torch.isfinite(left).all()):
        return math.inf
    return float((left - right).abs().max()) / max(1.0, float(right.abs().max()))
