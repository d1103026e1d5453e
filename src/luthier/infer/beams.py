"""Beams: the likeliest continuations of a prompt, found by keeping the best few at every token.

Equation: score(y) = sum_t log p(y_t | y_<t) / |y|. Of the continuations of all beams by one token, those that end are
    done if they are among the first k, and the first k others go on; over when the k best that are done cannot be
    beaten.
Source: as transformers has it (`early_stopping` off, length penalty 1): lines that have ended are compared with what
    the best open one has now, at its present length.
Cost: k continuations, which share the pages of what they have in common.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from luthier.infer.continuation import Continuation
from luthier.infer.reader import Reader
from luthier.infer.request import Said


@final
@dataclass(frozen=True)
class Line:
    """What a beam has said, and the sum of its log-probabilities."""

    said: tuple[Said, ...]
    total: float

    @property
    def score(self) -> float:
        """The mean log-probability of its tokens."""
        return self.total / max(1, len(self.said))


@final
@dataclass(frozen=True)
class Move:
    """A beam goes on from beam `source` with what `line` ends with."""

    source: int
    line: Line


@final
class Beams:
    """The open lines of a request, its best first, and those that have ended."""

    def __init__(self, count: int, *, stop_ids: tuple[int, ...], limit: int) -> None:
        self.count = count
        self.limit = limit
        self.open = [Line((), 0.0)]
        self.done: list[Line] = []
        self._stops = stop_ids

    @property
    def over(self) -> bool:
        """Whether no open line can come before those that are done."""
        if not self.open or len(self.open[0].said) >= self.limit:
            return True
        return len(self.done) >= self.count and self.open[0].score <= self.done[-1].score

    @property
    def best(self) -> list[tuple[Line, bool]]:
        """The best lines, and whether each has ended by itself."""
        lines = [(line, True) for line in self.done]
        if not self.open or len(self.open[0].said) >= self.limit or len(self.done) < self.count:
            lines += [(line, False) for line in self.open]
        return sorted(lines, key=lambda pair: -pair[0].score)[: self.count]

    def grow(self, logits: Float[Tensor, "beams V"]) -> list[Move]:
        """One token on, by what each open line may say next; which of them go on, and from where."""
        log_probs = torch.log_softmax(logits.float(), -1)
        totals = log_probs + torch.tensor([[line.total] for line in self.open], device=logits.device)
        size = logits.shape[-1]
        # So many that enough are left to go on with, should all others end.
        looked = max(2, 1 + len(self._stops)) * self.count
        best = totals.flatten().topk(min(looked, totals.numel()))
        moves: list[Move] = []
        for rank, (total, place) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            source, token = divmod(place, size)
            said = Said(token, float(log_probs[source, token]))
            line = Line((*self.open[source].said, said), total)
            if token not in self._stops:
                # At the last token only what is among the best counts, as if it had ended.
                if rank < self.count or len(line.said) < self.limit:
                    moves.append(Move(source, line))
            elif rank < self.count:
                self._end(line)
            if len(moves) == self.count:
                break
        self.open = [move.line for move in moves]
        return moves

    def _end(self, line: Line) -> None:
        self.done = sorted([*self.done, line], key=lambda each: -each.score)[: self.count]


@final
class Search:
    """The beams of a request as continuations, which wait for each other at every token."""

    def __init__(self, first: Continuation, make: Callable[[], Continuation]) -> None:
        request = first.request
        self.lines = Beams(request.beams, stop_ids=request.sampling.stop_ids, limit=first.limit)
        self.beams = [first]
        self._make = make
        self._logits: dict[int, Float[Tensor, " V"]] = {}

    @property
    def ready(self) -> bool:
        """Whether it is known of every beam what it may say next."""
        return len(self._logits) == len(self.beams)

    def take(self, each: Continuation, logits: Float[Tensor, " V"]) -> None:
        """What a beam may say next."""
        self._logits[id(each)] = logits

    def move(self, reader: Reader) -> None:
        """All beams go on by one token, are split, or end."""
        logits = torch.stack([self._logits[id(each)] for each in self.beams])
        self._logits.clear()
        moves = self.lines.grow(logits)
        if self.lines.over:
            return
        own = {move.source: move for move in reversed(moves)}
        beams: list[Continuation] = []
        for move in moves:
            source = self.beams[move.source]
            beam = source if own[move.source] is move else self._twin(source, reader)
            beams.append(beam)
        for each in self.beams:
            if each not in beams:
                reader.remove(each)
        for beam, move in zip(beams, moves, strict=True):
            beam.said.append(move.line.said[-1].token)
        self.beams = beams

    def _twin(self, source: Continuation, reader: Reader) -> Continuation:
        twin = self._make()
        twin.said.extend(source.said)
        # Once for all of them is told what is told of the prompt.
        twin.prompt_said = source.prompt_said
        reader.fork(source, twin)
        return twin
