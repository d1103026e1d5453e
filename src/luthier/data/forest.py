"""The forest: the one data structure of the engine.

Idea: a segment is a run of tokens with a parent; its tokens see all tokens of its ancestors and the earlier tokens of
its own. Rows of different lengths, a prompt with two answers, a prompt with G rollouts and a KV cache are all forests,
so there is one executor and no padding anywhere.

Each token carries a loss weight: 0 means context only. The token after a parent's last one is the first token of every
child, so one position can predict several tokens; `Layout.predictors` therefore holds (position, label) *pairs* and no
label is lost.

A token may carry `notes` beside its weight: numbers that were found out before the pass and that a loss needs, such as
what a reference model says of it, or with what probability it was sampled.

A segment may have `labels`: what each position says is then not the next token but what stands there, a class or a
token that was masked. It may see `both_ways`: each of its tokens sees all of them. In an encoder all segments do; an
encoder-decoder reads roots that do with its encoder, and their children with its decoder.

This file knows numpy only: what is in a forest is decided before any tensor exists.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from luthier.core.errors import DataError

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]

Note = Literal["reference", "sampled", "old", "advantage", "value", "return", "version", "correction"]
"""What may be noted of a token: its log-probability under the reference model, under the policy that sampled it, and
under the policy that its steps begin with as the trainer computes it; its advantage, and the value of the state it was
chosen in, as it was then and as it turned out; after how many steps the policy that sampled it stood, and what a token
counts for that a later policy learns from."""

ROOT = -1
"""The parent of a segment that has none."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of `tokens` (n,) with the loss weight of each, (n,), and the index of its parent within the tree.

    `labels` (n,) is what each position predicts, where that is not the next token; `weights` are then theirs. `types`
    (n,) are the token types of an encoder that tells two texts apart. `both_ways` lets each token see all others.
    `notes` have a number for each token, (n,), of which those of weighted ones are looked at.
    """

    tokens: Ints
    weights: Floats
    parent: int = ROOT
    labels: Ints | None = None
    types: NDArray[np.uint8] | None = None
    both_ways: bool = False
    notes: Mapping[Note, Floats] | None = None

    def __post_init__(self) -> None:
        noted = (self.notes or {}).items()
        for name, each in (("weights", self.weights), ("labels", self.labels), ("types", self.types), *noted):
            if each is not None and len(each) != len(self.tokens):
                raise DataError(f"a segment has {len(self.tokens)} tokens but {len(each)} {name}")
        if len(self.tokens) == 0:
            raise DataError("a segment has no token", do="leave empty segments out")

    @property
    def weighted(self) -> NDArray[np.bool_]:
        """Which of its labels, (n,), carry weight and are predicted: without `labels` nothing predicts a first one."""
        weighted: NDArray[np.bool_] = self.weights != 0
        if self.labels is None and self.parent == ROOT:
            weighted[0] = False
        return weighted

    def noting(self, note: Note, values: Floats) -> Segment:
        """The segment with one more note, of its weighted tokens (w,); an earlier one of that name is replaced."""
        whole = np.zeros(len(self.tokens), dtype=np.float32)
        whole[self.weighted] = values
        return replace(self, notes={**(self.notes or {}), note: whole})


@dataclass(frozen=True, slots=True)
class Tree:
    """Segments in an order where parents come first, and the data row they were made from.

    `adapter` names the attachment that computes it, and no other does; empty takes all that are switched on.
    """

    segments: tuple[Segment, ...]
    row: int = 0
    adapter: str = ""

    def __post_init__(self) -> None:
        for index, segment in enumerate(self.segments):
            if not ROOT <= segment.parent < index:
                raise DataError(
                    f"segment {index} has parent {segment.parent}", allowed="a parent that comes before its children"
                )

    @property
    def token_count(self) -> int:
        return sum(len(segment.tokens) for segment in self.segments)

    @property
    def weight(self) -> float:
        """The sum of the loss weights of the tokens that something predicts."""
        return sum(float(segment.weights[segment.weighted].sum(dtype=np.float64)) for segment in self.segments)

    def paths(self) -> list[list[int]]:
        """Every way from a root to a leaf, as segment indices."""
        parents = {segment.parent for segment in self.segments}
        leaves = [index for index in range(len(self.segments)) if index not in parents]
        return [self.path(leaf) for leaf in leaves]

    def path(self, index: int) -> list[int]:
        """The segment indices from the root down to `index`."""
        way = [index]
        while (parent := self.segments[way[0]].parent) != ROOT:
            way.insert(0, parent)
        return way


def row_tree(tokens: Ints, weights: Floats, *, row: int = 0) -> Tree:
    """The tree of one plain row: a single segment."""
    return Tree((Segment(tokens, weights),), row=row)


@dataclass(frozen=True)
class Span:
    """Where a segment lies in the flat batch, and the flat segments it descends from, root first."""

    start: int
    stop: int
    ancestors: tuple[int, ...]
    both_ways: bool = False

    @property
    def length(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Layout:
    """A forest laid end to end.

    `tokens`, `positions` and `types` are (T,); `predictors`, `labels`, `weights`, `rows` and `trees` are (N,), one
    entry for each token with weight: the flat position whose hidden state predicts it, the token (or the class), its
    weight, the data row and the index of its tree. `notes` are (N,) too.
    """

    tokens: Ints
    positions: Ints
    types: NDArray[np.uint8]
    spans: tuple[Span, ...]
    predictors: Ints
    labels: Ints
    weights: Floats
    rows: Ints
    trees: Ints
    notes: Mapping[Note, Floats]


@dataclass(frozen=True)
class Forest:
    """Trees that go through the model together, in one flat pass."""

    trees: tuple[Tree, ...]

    @property
    def token_count(self) -> int:
        return sum(tree.token_count for tree in self.trees)

    @cached_property
    def weight(self) -> float:
        """The sum of the weights of all predicted tokens: what a loss over this forest is divided by."""
        return sum(tree.weight for tree in self.trees)

    @property
    def trained_count(self) -> int:
        """How many tokens carry weight."""
        return len(self.layout.labels)

    @cached_property
    def layout(self) -> Layout:
        """The flat form that the executor runs."""
        return _lay_out(self.trees)


def _lay_out(trees: Sequence[Tree]) -> Layout:
    spans: list[Span] = []
    positions: list[Ints] = []
    predictors: list[Ints] = []
    labels: list[Ints] = []
    weights: list[Floats] = []
    rows: list[Ints] = []
    tree_ids: list[Ints] = []
    start = 0
    for tree_id, tree in enumerate(trees):
        offset = len(spans)
        for segment in tree.segments:
            ancestors, depth, before = _lineage(spans, segment.parent, offset)
            count = len(segment.tokens)
            spans.append(Span(start, start + count, ancestors, segment.both_ways))
            positions.append(np.arange(depth, depth + count, dtype=np.int32))
            kept = segment.weighted
            predictors.append(_predictors(segment, start, before)[kept])
            labels.append((segment.tokens if segment.labels is None else segment.labels)[kept])
            weights.append(segment.weights[kept])
            rows.append(np.full(int(kept.sum()), tree.row, dtype=np.int32))
            tree_ids.append(np.full(int(kept.sum()), tree_id, dtype=np.int32))
            start += count
    return Layout(
        tokens=_join([segment.tokens for tree in trees for segment in tree.segments], np.int32),
        positions=_join(positions, np.int32),
        types=_join([_types(segment) for tree in trees for segment in tree.segments], np.uint8),
        spans=tuple(spans),
        predictors=_join(predictors, np.int32),
        labels=_join(labels, np.int32),
        weights=_join(weights, np.float32),
        rows=_join(rows, np.int32),
        trees=_join(tree_ids, np.int32),
        notes=_joined_notes(trees),
    )


def _joined_notes(trees: Sequence[Tree]) -> dict[Note, Floats]:
    """Each note of all weighted tokens; NaN in trees without it. Raises DataError where a tree has it in part."""
    told = [[segment for segment in tree.segments if segment.weighted.any()] for tree in trees]
    names = dict.fromkeys(name for segments in told for segment in segments for name in segment.notes or {})
    for name in names:
        for tree, segments in zip(trees, told, strict=True):
            if 0 < (lacking := sum(name not in (segment.notes or {}) for segment in segments)) < len(segments):
                raise DataError(
                    f"{lacking} of {len(segments)} segments with weight of row {tree.row} have no note {name!r}",
                    allowed="a note on all trained tokens of a tree, or on none",
                )
    return {name: _join([_note(each, name) for segments in told for each in segments], np.float32) for name in names}


def _note(segment: Segment, name: Note) -> Floats:
    kept = segment.weighted
    noted = (segment.notes or {}).get(name)
    return np.full(int(kept.sum()), np.nan, dtype=np.float32) if noted is None else noted[kept]


def _predictors(segment: Segment, start: int, before: int) -> Ints:
    """The flat position that predicts each label of a segment at `start`, whose parent ends at `before`."""
    own = np.arange(start, start + len(segment.tokens), dtype=np.int32)
    if segment.labels is not None:
        return own
    # The token at index i is predicted by the one before it; the first by the last token of the parent.
    own -= 1
    own[0] = before
    return own


def _types(segment: Segment) -> NDArray[np.uint8]:
    return np.zeros(len(segment.tokens), np.uint8) if segment.types is None else segment.types


def _lineage(spans: Sequence[Span], parent: int, offset: int) -> tuple[tuple[int, ...], int, int]:
    """The flat ancestors of a child of `parent`, the position of its first token, and the flat position before it."""
    if parent == ROOT:
        return (), 0, -1
    ancestors = (*spans[offset + parent].ancestors, offset + parent)
    depth = sum(spans[index].length for index in ancestors)
    return ancestors, depth, spans[offset + parent].stop - 1


def _join(arrays: Sequence[NDArray[np.generic]], dtype: type[np.generic]) -> NDArray:  # type: ignore[type-arg]
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.zeros(0, dtype)


def pack(trees: Iterable[Tree], *, max_tokens: int) -> list[Forest]:
    """Micro-batches of at most `max_tokens` tokens, in order; a larger tree becomes a forest of its own.

    How trees are cut into forests never changes a gradient (losses are sums), only memory and speed.
    """
    forests: list[Forest] = []
    current: list[Tree] = []
    room = max_tokens
    for tree in trees:
        if current and tree.token_count > room:
            forests.append(Forest(tuple(current)))
            current, room = [], max_tokens
        current.append(tree)
        room -= tree.token_count
    if current:
        forests.append(Forest(tuple(current)))
    return forests
