"""What a pass through the zoo's own blocks keeps: counted on a few tokens of this model with this adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

import numpy as np
from torch import nn

from luthier.arithmetic.counted import Load, Rates, Texts, counted_peak
from luthier.arithmetic.memory import Decoder, Peak, Work
from luthier.data.forest import Forest, Segment, Span, Tree
from luthier.model.editing.attachment import Attachment
from luthier.model.editing.edits import LearnedPrompt
from luthier.model.kept_tensors import kept_by_stage
from luthier.model.language_model import LanguageModel
from luthier.model.tasks import kind_of
from luthier.recipes.sizing.sizes import edits_inner

_UNIT: Final = {"cpu": 4, "cuda": 32}
"""Tokens of the shortest row that is counted; kernels of a GPU round the sizes of what they keep up to 32."""

_ROWS: Final = (
    ((1, 1, 1), (2, 1, 2)),
    ((2, 1, 1), (3, 2, 1), (1, 1, 1)),
    ((3, 3, 1), (1, 1, 2)),
    ((2, 1, 1), (2, 1, 1)),
    ((1, 1, 1), (1, 1, 1), (1, 1, 1)),
    ((2, 1, 1), (1, 2, 1), (2, 1, 1)),
    ((3, 2, 1), (3, 1, 1), (1, 2, 1), (3, 2, 2)),
    ((2, 2, 1), (2, 2, 1), (1, 1, 1)),
    ((3, 3, 2), (3, 3, 2)),
    ((2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 2, 2)),
    ((1, 1, 2), (1, 1, 2), (1, 1, 2), (3, 3, 1), (2, 2, 2)),
    ((1, 2, 2), (2, 2, 2), (2, 1, 3)),
    ((2, 1, 2), (1, 2, 1)),
    ((1, 2, 1), (1, 1, 1)),
    ((1, 3, 1), (2, 3, 1), (2, 2, 1)),
    ((1, 1, 3), (1, 2, 1), (2, 1, 1)),
    ((3, 1, 2), (1, 3, 2)),
    ((2, 2, 1), (3, 1, 1), (2, 1, 2)),
    ((1, 2, 3), (3, 2, 1)),
    ((2, 3, 2), (2, 2, 1), (1, 3, 1)),
    ((1, 1, 1), (2, 2, 1), (1, 3, 1), (2, 1, 1), (1, 2, 1)),
    ((3, 1, 1), (2, 2, 2), (3, 3, 1)),
    ((2, 1, 2), (2, 1, 2)),
    ((3, 2, 3), (3, 2, 3), (3, 2, 1)),
)
"""Passes that are counted: for each row the units of its text, of each of its answers, and how many answers it has.

There are as many as x has numbers that differ, and a few more; of one stack the first ones are enough."""
_OF_ONE_STACK: Final = 12
_LONGEST: Final = 3
_ALWAYS_TAKEN: Final = 2
"""Positions that some models keep for padding."""
MOST: Final = 1 << 20


@dataclass(frozen=True)
class Counted:
    """What was counted of a model: its rates, how many blocks are an encoder's with a decoder above it, whether edits
    work within feed-forwards, and whether states are dropped out."""

    rates: Rates
    readers: int
    edits_inner: bool
    drops: bool

    @classmethod
    def of(cls, model: LanguageModel, attachment: Attachment) -> Counted:
        """The model as it stands, with what is attached and trained."""
        passes = _ROWS if model.sites.two_stacks else _ROWS[:_OF_ONE_STACK]
        unit = _unit(model)
        forests = [Forest(tuple(_tree(model, unit, *row) for row in rows)) for rows in passes]
        loads, counts = [load_of(model, each) for each in forests], [kept_by_stage(model, each) for each in forests]
        readers = model.sites.layers - model.sites.root_layers if model.sites.two_stacks else 0
        drops = any(isinstance(each, nn.Dropout) and each.p > 0 for each in model.module.modules())
        return cls(Rates.of(loads, counts), readers, edits_inner(model, attachment), drops)

    def peak(self, model: LanguageModel, decoder: Decoder, work: Work, forest: Forest) -> Peak:
        """The widest moment of a pass of this forest."""
        load = load_of(model, forest)
        return counted_peak(
            decoder, work, self.rates, load, readers=self.readers, edits_inner=self.edits_inner, drops=self.drops
        )


def load_of(model: LanguageModel, forest: Forest) -> Load:
    """A forest in the numbers that memory grows with, learned roots and padding included."""
    layout, root, two = forest.layout, model.active_root, model.sites.two_stacks
    ahead = 0 if root is None else root.token_count
    prompts = isinstance(root, LearnedPrompt)
    # A prompt stands before each text where it sees the text; else it is made into keys and values apart.
    within = ahead if prompts and kind_of(model.config) != "causal" else 0
    texts = [(index, span) for index, span in enumerate(layout.spans) if span.both_ways or not two]
    answers = [span for span in layout.spans if not span.both_ways] if two else []
    read = {index: span.length + within for index, span in texts}
    own = [(read[index], read[index] + (0 if two else ahead - within + _above(span, layout.spans)))
           for index, span in texts]  # fmt: skip
    said = [(span.length, span.length + (0 if prompts else ahead)) for span in answers]
    alone = ahead > within
    if model.executor.kind != "segments":
        own, said, alone = _padded(own), _padded(said), False
    return Load(
        texts=Texts.of(_runs(own, alone=alone and not two)),
        answers=Texts.of(_runs(said, alone=alone and two and not prompts)),
        read=sum(read[span.ancestors[0]] for span in answers),
        crossed=sum(span.length * read[span.ancestors[0]] for span in answers),
        predicted=len(layout.labels),
    )


def _above(span: Span, spans: Sequence[Span]) -> int:
    return sum(spans[index].length for index in span.ancestors)


def _padded(sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    return [max(sizes)] * len(sizes) if sizes else []


def _runs(sizes: Sequence[tuple[int, int]], *, alone: bool) -> list[tuple[int, int, int]]:
    """Neighbours of one size, as attention takes them together, unless each is `alone`."""
    if alone:
        return [(1, *size) for size in sizes]
    return [(len(list(same)), *size) for size, same in groupby(sizes)]


def _unit(model: LanguageModel) -> int:
    """Tokens of the shortest text, so that there is room for the longest."""
    root = model.active_root
    room = (model.context_tokens or MOST) - (0 if root is None else root.token_count)
    return max(1, min(_UNIT.get(model.device.type, _UNIT["cuda"]), (room - _ALWAYS_TAKEN) // _LONGEST))


def _tree(model: LanguageModel, unit: int, text: int, answer: int, answers: int) -> Tree:
    """A row of so many units of tokens, as the model's task has rows."""
    size, kind = model.vocabulary_size, kind_of(model.config)
    if kind == "seq2seq":
        read = Segment(_ids(text * unit, size), np.zeros(text * unit, np.float32), both_ways=True)
        return Tree((read, *(_answer(answer * unit, size) for _ in range(answers))))
    count = text * unit
    weights = np.zeros(count, np.float32)
    if model.task.name in ("sequence_classes", "scores"):
        weights[0 if kind == "encoder" else -1] = 1
    else:
        weights[: answer + answers] = 1
    if kind == "causal" and not model.task.classifies:
        return Tree((Segment(_ids(count, size), weights),))
    return Tree((Segment(_ids(count, size), weights, labels=np.zeros(count, np.int32)),))


def _answer(count: int, size: int) -> Segment:
    weights = np.ones(count, np.float32)
    weights[0] = 0
    return Segment(_ids(count, size), weights, 0)


def _ids(count: int, size: int) -> np.ndarray:
    return (np.arange(count) * 7 + 5).astype(np.int32) % size
