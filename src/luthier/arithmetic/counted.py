"""Memory of a pass through blocks whose insides are not ours: counted on a few tokens, told for many.

Idea: what a block keeps is a sum over tokens, and over pairs of a query and a key where attention keeps such; so a few
counts of small passes give all factors, and these any pass. Texts of one size that lie side by side go through
attention in one call, which copies what it needs of them; of the others it keeps views of a whole batch.
Equation: kept_i = a_i . x for stage i, x = (1, texts, answers, U, X, N), with eight numbers each of texts and answers:
    rows, T = tokens, S = sum of n m over rows with n queries and m keys each, the same over different sizes alone (a
    bias by distance is made once for a size, and shared by all layers) and over calls, T and S of rows that share a
    call, and T again if any row is alone; U = tokens read, X = tokens said times tokens read, both summed over answers;
    N = predictions. a_i solves least squares, exactly where x says all.
    The peak is the widest of: all that is kept, with the head at work; and for each block what is kept up to it, with
    the gradients of its insides at work: of a feed-forward (2 + g + e) f + 2 d numbers a token (g with a gate, e with
    edits before the way down; the gradient behind the bend and before it, of the stream and of the sum); of attention
    2 q + 2 kv + d, and for each pair of its largest call as much as is kept of a pair. While a decoder goes backward,
    the gradient of the encoder's states, d a token of the texts, waits for the encoder. A block that keeps nothing, as
    where only what lies above it is trained, is at work forward alone: (2 + g + o) f + 4 d numbers a token (o where it
    drops out).
Source: torch's saved-tensor hooks (model/kept_tensors.py), for all adapters, with dropout and without: 0.5 %
    of what autograd keeps, tests/recipes/test_zoo_memory.py; and 10 % of the peak of processes,
    tests/recipes/test_memory.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from luthier.arithmetic.memory import Decoder, Peak, Work, head_at_work, own_gradients


@dataclass(frozen=True)
class Texts:
    """Texts that go through a stack at once, in the numbers that memory grows with; see the equation."""

    rows: int = 0
    tokens: int = 0
    pairs: int = 0
    sizes: int = 0
    calls: int = 0
    joined: int = 0
    joined_pairs: int = 0
    viewed: int = 0
    squares: int = 0
    largest: int = 0

    @classmethod
    def of(cls, runs: Sequence[tuple[int, int, int]]) -> Texts:
        """Of `runs` of texts of one size, which attention takes in one call: how many, their queries, their keys."""
        return cls(
            rows=sum(count for count, _, _ in runs),
            tokens=sum(count * queries for count, queries, _ in runs),
            pairs=sum(count * queries * keys for count, queries, keys in runs),
            sizes=sum(queries * keys for queries, keys in {run[1:] for run in runs}),
            calls=sum(queries * keys for _, queries, keys in runs),
            joined=sum(count * queries for count, queries, _ in runs if count > 1),
            joined_pairs=sum(count * queries * keys for count, queries, keys in runs if count > 1),
            viewed=sum(count * queries for count, queries, _ in runs) * any(count == 1 for count, _, _ in runs),
            squares=sum(count * queries * queries for count, queries, _ in runs),
            largest=max((count * queries * keys for count, queries, keys in runs), default=0),
        )


@dataclass(frozen=True, kw_only=True)
class Load:
    """What goes through a model at once: texts, answers to them, how many pairs of the two, how many predictions."""

    texts: Texts
    answers: Texts = Texts()
    read: int = 0
    crossed: int = 0
    predicted: int = 0

    @property
    def numbers(self) -> tuple[int, ...]:
        """x, with its leading 1."""
        # Queries with queries are told by the others, and the largest call is no sum.
        return (1, *astuple(self.texts)[:-2], *astuple(self.answers)[:-2], self.read, self.crossed, self.predicted)


@dataclass(frozen=True)
class Rates:
    """The factors a, (stages, numbers), that counts have given."""

    factors: NDArray[np.float64]

    @classmethod
    def of(cls, loads: Sequence[Load], counts: Sequence[Sequence[int]]) -> Rates:
        """What small passes of these loads have kept, stage by stage."""
        given = np.array([load.numbers for load in loads], dtype=np.float64)
        solved = np.linalg.lstsq(given, np.array(counts, dtype=np.float64), rcond=None)[0]
        return cls(solved.T.astype(np.float64))

    def kept(self, load: Load) -> list[int]:
        """Bytes that each stage keeps."""
        return [max(0, round(each)) for each in (self.factors @ np.array(load.numbers, dtype=np.float64)).tolist()]

    def of_pairs(self, stage: int) -> float:
        """Bytes that a stage keeps of a pair of query and key."""
        return max(0.0, float(self.factors[stage, 1 + _PAIRS]))


_PAIRS = [each.name for each in fields(Texts)].index("pairs")


def counted_peak(
    decoder: Decoder, work: Work, rates: Rates, load: Load, *, readers: int, edits_inner: bool = False,
    drops: bool = False,
) -> Peak:  # fmt: skip
    """The moment of a pass at which most is alive; the first `readers` blocks are an encoder's, if there is a decoder.

    `edits_inner` is whether edits work on what goes into the way down of a feed-forward, `drops` whether states are
    dropped out.
    Stages are what comes before the first block, the block, what comes between it and the next, and so on.
    """
    backward = 2 + decoder.gated + edits_inner
    forward = 2 + decoder.gated + drops
    return max(_moments(decoder, work, rates, load, readers, (forward, backward)), key=lambda moment: moment.total)


def _moments(
    decoder: Decoder, work: Work, rates: Rates, load: Load, readers: int, inner: tuple[int, int]
) -> Iterator[Peak]:
    forward, backward = inner
    kept = rates.kept(load)
    below = list(accumulate(kept))
    yield Peak(kept=below[-1], working=head_at_work(decoder, work))
    # Where nothing is known to be a block, all of it is one.
    for stage in range(1, len(kept), 2) if len(kept) > 1 else (0,):
        reads = not load.answers.rows or stage // 2 < readers
        texts = load.texts if reads else load.answers
        # What the layers of a decoder find out about the encoder's states is added up until the encoder's turn.
        waits = 0 if reads else load.texts.tokens * decoder.hidden * decoder.bytes
        if not kept[stage]:
            passing = texts.tokens * (forward * decoder.inner + 4 * decoder.hidden) * decoder.bytes
            yield Peak(kept=below[stage], working=passing)
        yield Peak(kept=below[stage], working=_feed_forward(decoder, work, texts.tokens, backward) + waits)
        squares = round(rates.of_pairs(stage) * texts.largest)
        done = min(kept[stage], texts.tokens * decoder.inner * decoder.bytes)
        yield Peak(kept=below[stage] - done, working=_attention(decoder, texts.tokens) + squares + waits)


def _feed_forward(decoder: Decoder, work: Work, tokens: int, inner: int) -> int:
    """The gradients of so many `inner` states, before and after the bend and of a gate, of the stream and its sum."""
    return tokens * (inner * decoder.inner + 2 * decoder.hidden) * decoder.bytes + own_gradients(decoder, work)


def _attention(decoder: Decoder, tokens: int) -> int:
    """The gradients of heads, queries, keys, values, and of the stream."""
    return tokens * (2 * decoder.query + 2 * decoder.key_value + decoder.hidden) * decoder.bytes
