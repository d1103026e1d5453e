"""A whole distribution as the goal: how far the policy is from a teacher at each token that carries weight.

Idea: what a teacher would have said instead is in its logits, which for a batch would be a tensor of tokens by
vocabulary, twice. So only its final states are kept, a row of the hidden size for each token, and the logits of both
are made a few rows at a time. A divergence of a row depends on the student's state of that row alone, so with a frozen
head its gradient is one vector of the hidden size, found while the logits are at hand; nothing is computed twice.
With a head that is trained, the chunk is computed again in the backward pass.
Source: Agarwal et al., arXiv 2306.13649; chunks over rows as in kernels/head.py.
Cost: 2 N V (d + d of the teacher) FLOPs forward, 2 N V d for the gradient; about 8 chunk x V numbers of memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from luthier.core.errors import RecipeError
from luthier.data.forest import Forest
from luthier.kernels.head import Head
from luthier.kernels.torch_backend import wide
from luthier.maths.divergences import Comparison, divergences
from luthier.model.language_model import LanguageModel
from luthier.model.running.executor import predicting_states
from luthier.model.running.outputs import TokenOutputs
from luthier.model.running.scoring import AnyHead, long, outputs_of
from luthier.model.running.unrolled import unrolled_states
from luthier.model.running.zoo_head import FeatureHead, tempered
from luthier.model.zoo import ZooModule

CHUNK_ROWS = 64
"""Rows whose logits, of both models and with their gradients, are held at once."""
Rule = Callable[[Tensor, slice], Tensor]
"""From the states of some rows, and which these are, to a number for each and the log-probability of its label."""


@dataclass(frozen=True)
class Taught:
    """What a teacher says of the weighted tokens of a forest: its final `states`, and the head that reads them."""

    states: Float[Tensor, "N e"]
    head: AnyHead
    module: ZooModule

    def log_probs(self, rows: slice, size: int) -> Float[Tensor, "n V"]:
        """Log-probabilities of the first `size` tokens of the vocabulary, which are all that the student knows."""
        with torch.no_grad():
            return torch.log_softmax(_logits(self.module, self.head, self.states[rows])[:, :size], -1)

    @property
    def size(self) -> int:
        """How many tokens it knows."""
        return int(_logits(self.module, self.head, self.states[:1]).shape[1]) if len(self.states) else 0


@torch.no_grad()
def taught(teacher: LanguageModel, forest: Forest, *, temperature: float) -> Taught:
    """What a model, as it is switched now, would say at each weighted token of a forest."""
    return Taught(_states(teacher, forest), tempered(teacher.head, temperature), teacher.module)


def compared_outputs(
    model: LanguageModel, forest: Forest, told: Taught, comparison: Comparison, *, temperature: float
) -> TokenOutputs:
    """The outputs of a forest with the divergence from what a teacher has `told`, differentiable in what is trained.

    The log-probabilities beside it are only looked at; they have no gradient.
    """
    if any(tree.adapter for tree in forest.trees):
        raise RecipeError(
            "several adapters in one batch, and a teacher whose whole distribution is to be met",
            allowed="one adapter in such a run",
        )
    layout, head = forest.layout, tempered(model.head, temperature)
    labels, hidden = long(layout.labels, model.module), _states(model, forest)
    # Rows of padding at the end of a vocabulary differ between sizes of one family.
    size = min(told.size, model.vocabulary_size)

    def rule(states: Tensor, rows: slice) -> Tensor:
        own = torch.log_softmax(_logits(model.module, head, states)[:, :size], -1)
        found = divergences(own, told.log_probs(rows, size), comparison)
        return torch.stack([found, own.gather(1, labels[rows, None])[:, 0]], 1)

    both = by_rows(hidden, rule)
    return outputs_of(layout, both[:, 1].detach(), model.module, divergences=both[:, 0])


def by_rows(hidden: Float[Tensor, "N d"], rule: Rule, *, chunk_rows: int = CHUNK_ROWS) -> Float[Tensor, "N two"]:
    """What a rule that looks at each row by itself gives, of which the first column is differentiable.

    Never more than `chunk_rows` rows at once.
    """
    parts = [slice(start, min(start + chunk_rows, len(hidden))) for start in range(0, len(hidden), chunk_rows)]
    if not parts:
        return torch.cat([hidden.sum(-1, keepdim=True)] * 2, 1).to(wide(hidden))
    if not torch.is_grad_enabled():
        return torch.cat([rule(hidden[rows], rows) for rows in parts])
    if rule(hidden[:1].detach(), slice(0, 1)).requires_grad:
        again = [checkpoint(rule, hidden[rows], rows, use_reentrant=False) for rows in parts]
        return torch.cat(again)
    found: Tensor = _ByRows.apply(hidden, rule, parts)  # type: ignore[no-untyped-call]
    return found


class _ByRows(torch.autograd.Function):
    """With nothing to train but what made the states: the gradient of each row is found on the way."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, rule: Rule, parts: list[slice]) -> Tensor:
        jacobian, made = torch.empty_like(hidden), []
        for rows in parts:
            with torch.enable_grad():
                states = hidden[rows].detach().requires_grad_()
                found = rule(states, rows)
                [jacobian[rows]] = torch.autograd.grad(found[:, 0].sum(), states)
            made.append(found.detach())
        ctx.save_for_backward(jacobian)
        return torch.cat(made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        [jacobian] = ctx.saved_tensors
        return jacobian * upstream[:, :1].to(jacobian.dtype), None, None


def _states(model: LanguageModel, forest: Forest) -> Float[Tensor, "N d"]:
    """The final states from which the weighted tokens of a forest are predicted."""
    ways = model.executor
    if ways.kind == "segments":
        root = model.active_root
        return predicting_states(model.module, forest.layout, root=root, blocks=ways.blocks, by_mask=ways.by_mask)
    return unrolled_states(model.module, forest)


def _logits(module: ZooModule, head: AnyHead, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n V"]:
    """The logits of a few rows, with a graph where there is one."""
    if isinstance(head, FeatureHead):
        hidden, head = head.features(hidden), head.plain
    if not isinstance(head, Head):
        layer = head.logits if head is not None else module.get_output_embeddings()
        made: Tensor = layer(hidden)  # type: ignore[misc]
        return made.to(wide(made))
    logits = torch.nn.functional.linear(hidden, head.weight)
    logits = logits.to(wide(logits))
    for change in head.changes:
        added = (change.trained - change.start).to(hidden.dtype)
        logits = logits.index_add(1, change.ids, (hidden @ added.t()).to(logits.dtype))
    if head.scale != 1.0:
        logits = logits * head.scale
    if head.bias is not None:
        logits = logits + head.bias
    return logits if head.cap is None else torch.tanh(logits / head.cap) * head.cap


