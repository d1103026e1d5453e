"""A tree too large for one micro-batch: its root once, its branches in parts, the same gradient.

Idea: the root segment goes through the model first, and its keys, values and last hidden state are cut off its graph as
leaves. Branches run in several parts that see these leaves; each part's backward pass adds its gradients to them. At
last the root runs backward once, from its own losses and from what has gathered in the leaves. Only the root and one
part are ever alive.
Source: schedule-level prefix reuse, arXiv 2606.01143; here over segments, and with the label that the root's last
position predicts for every branch.
Cost: the root's tokens are computed once, however many parts there are.
Use when: one prompt has so many answers that they do not fit at once. Not when: a loss couples the branches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from luthier.data.forest import ROOT, Forest, Ints, Segment, Span, Tree
from luthier.model.attending.attention import ForestPlan, Root
from luthier.model.attending.block_mask import MaskedAttention
from luthier.model.editing.edits import LearnedRoot
from luthier.model.editing.value_head import ValueHead
from luthier.model.routes import Routes, whole
from luthier.model.running.blocks import Blocks
from luthier.model.running.executor import flat_hidden, seen_root
from luthier.model.running.outputs import LossReport, TokenOutputs
from luthier.model.running.own_lengths import span_lengths
from luthier.model.running.scoring import AnyHead, long, outputs_of, score
from luthier.model.zoo import ZooModule

Loss = Callable[[TokenOutputs, Forest], LossReport]
Part = tuple[Forest, TokenOutputs, LossReport]


@dataclass(frozen=True)
class _Trunk:
    """The root after its forward pass: its states with their graph, and the leaves that stand in for them."""

    hidden: Float[Tensor, "root d"]
    keys_values: dict[int, tuple[Tensor, Tensor]]
    last_leaf: Float[Tensor, "1 d"]
    leaves: dict[int, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Way:
    """How the passes of one tree go. However it is cut, its texts have as many `places` as they had, root included."""

    module: ZooModule
    root: LearnedRoot | None
    blocks: Blocks | None
    places: int

    def seen_root(self, adapter: str) -> Root | None:
        """The learned root as attention sees it."""
        return seen_root(self.module, self.root, self.blocks, adapter=adapter, places=self.places)

    def hidden(self, tokens: Ints, positions: Ints, plan: ForestPlan) -> Float[Tensor, "T d"]:
        """The final states of a pass; `positions` (T,) are those behind the learned root."""
        ids, at = long(tokens, self.module), long(positions, self.module)
        ahead = 0 if plan.root is None else plan.root.token_count
        lengths = np.full(len(tokens), self.places, np.int32)
        return flat_hidden(self.module, ids, at + ahead, plan, blocks=self.blocks, lengths=lengths)


def can_split(tree: Tree) -> bool:
    """Whether a tree has one root with branches that can run apart."""
    return [segment.parent for segment in tree.segments].count(ROOT) == 1 and len(tree.segments) > 1


def backward_in_parts(
    module: ZooModule,
    tree: Tree,
    loss: Loss,
    *,
    head: AnyHead,
    max_tokens: int,
    root: LearnedRoot | None = None,
    blocks: Blocks | None = None,
    by_mask: MaskedAttention | None = None,
    values: ValueHead | None = None,
) -> Iterator[Part]:
    """Run `tree` forward and backward in parts of at most `max_tokens` new tokens, and yield what each part found.

    The gradients of the *sum* of losses are added to whatever is trained once the iterator is exhausted. A branch that
    is larger than `max_tokens` is a part of its own.
    """
    ahead = 0 if root is None else root.token_count
    spans = Forest((tree,)).layout.spans
    way = _Way(module, root, blocks, max(span_lengths(spans, [ahead] * len(spans))))
    trunk = _run_trunk(way, tree)
    for part in _parts(tree, max_tokens):
        first, hidden = _run_branches(way, part, trunk, by_mask)
        outputs = _score(module, part, hidden, head, values, first=first)
        report = loss(outputs, part)
        if report.sum.requires_grad:
            report.sum.backward()
        yield part, outputs, report
    own = Forest((replace(tree, segments=(tree.segments[0],)),))
    outputs = _score(module, own, trunk.hidden, head, values, first=0)
    # A prompt that carries no weight is nothing to an objective.
    report = loss(outputs, own) if own.trained_count else LossReport(outputs.log_probs.sum(), 0.0)
    _backward_trunk(trunk, report.sum)
    yield own, outputs, report


def _run_trunk(way: _Way, tree: Tree) -> _Trunk:
    tokens = tree.segments[0].tokens
    captured: dict[int, tuple[Tensor, Tensor]] = {}
    plan = ForestPlan(
        spans=(Span(0, len(tokens), ()),),
        root=way.seen_root(tree.adapter),
        captured=captured,
        routes=_routes(tree, len(tokens)),
    )
    hidden = way.hidden(tokens, np.arange(len(tokens), dtype=np.int32), plan)
    leaves = {layer: (_leaf(key), _leaf(value)) for layer, (key, value) in captured.items()}
    return _Trunk(hidden, captured, _leaf(hidden[-1:]), leaves)


def _run_branches(
    way: _Way, part: Forest, trunk: _Trunk, by_mask: MaskedAttention | None
) -> tuple[int, Float[Tensor, "n d"]]:
    """The states of the branches of a part, seeing the trunk through its leaves, and the flat position of the first."""
    layout = part.layout
    length = layout.spans[0].length
    # The trunk is no span of this pass: every branch loses it as an ancestor and gets it from outside instead.
    spans = tuple(
        Span(span.start - length, span.stop - length, tuple(ancestor - 1 for ancestor in span.ancestors if ancestor))
        for span in layout.spans[1:]
    )
    tree = part.trees[0]
    seen, routes = way.seen_root(tree.adapter), _routes(tree, spans[-1].stop)
    plan = ForestPlan(spans=spans, root=seen, outer=trunk.leaves, by_mask=by_mask, routes=routes)
    hidden = way.hidden(layout.tokens[length:], layout.positions[length:], plan)
    return length - 1, torch.cat([trunk.last_leaf, hidden])


def _routes(tree: Tree, count: int) -> Routes | None:
    return whole(tree.adapter, count) if tree.adapter else None


def _score(
    module: ZooModule,
    forest: Forest,
    hidden: Float[Tensor, "n d"],
    head: AnyHead,
    values: ValueHead | None,
    *,
    first: int,
) -> TokenOutputs:
    """What comes out for a forest's weighted tokens; `hidden` starts at the flat position `first`."""
    layout = forest.layout
    predicting = hidden.index_select(0, long(layout.predictors, module) - first)
    worth = None if values is None else values.values(predicting)
    return outputs_of(layout, score(module, predicting, head, long(layout.labels, module)), module, values=worth)


def _backward_trunk(trunk: _Trunk, loss_sum: Tensor) -> None:
    """The root's backward pass: from its own losses and from the gradients that gathered in its leaves."""
    outputs: list[Tensor] = [loss_sum]
    gradients: list[Tensor | None] = [None]
    pairs = [(trunk.hidden[-1:], trunk.last_leaf)]
    for layer, (key, value) in trunk.keys_values.items():
        pairs += [(key, trunk.leaves[layer][0]), (value, trunk.leaves[layer][1])]
    for state, leaf in pairs:
        if leaf.grad is not None:
            outputs.append(state)
            gradients.append(leaf.grad)
    wanted = [(state, gradient) for state, gradient in zip(outputs, gradients, strict=True) if state.requires_grad]
    if wanted:
        torch.autograd.backward([state for state, _ in wanted], [gradient for _, gradient in wanted])


def _parts(tree: Tree, max_tokens: int) -> Iterator[Forest]:
    """The tree cut into trees that each have the whole root, without weight, and some of its branches."""
    trunk = tree.segments[0]
    silent = Segment(trunk.tokens, np.zeros_like(trunk.weights))
    kept: list[list[int]] = []
    room = 0
    for branch in _branches(tree):
        size = sum(len(tree.segments[index].tokens) for index in branch)
        if not kept or size > room:
            kept.append([])
            room = max_tokens
        kept[-1] += branch
        room -= size
    for indices in kept:
        place = {0: 0, **{old: new + 1 for new, old in enumerate(indices)}}
        moved = [replace(tree.segments[old], parent=place[tree.segments[old].parent]) for old in indices]
        yield Forest((replace(tree, segments=(silent, *moved)),))


def _branches(tree: Tree) -> list[list[int]]:
    """The subtrees below the root, each as its segment indices in order."""
    owner: dict[int, int] = {}
    branches: dict[int, list[int]] = {}
    for index, segment in enumerate(tree.segments[1:], start=1):
        owner[index] = index if segment.parent == 0 else owner[segment.parent]
        branches.setdefault(owner[index], []).append(index)
    return list(branches.values())


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)
