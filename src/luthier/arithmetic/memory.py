"""Memory and disk of a training run in bytes, from sizes alone.

Idea: what a backward pass needs is decided by the shapes of a decoder block, so the peak of a step can be told before
it is made. Counted is what autograd keeps until a layer's backward pass, tensor by tensor, for a block of attention and
feed-forward, run by our operations (kernels/blocks.py) or as the zoo writes it, with flash attention over segments.
Equation: a fused block keeps for each token 2 d (the residual stream before each half) + 2 q + 2 kv (queries, keys,
    values and the attention's output) + 2 f (gate and up), one number a norm and head, and the ranks of its adapters;
    of the last block's feed-forward only the tokens that predict something. The zoo's block keeps 2 d in float32 (what
    the norms see) + 2 q + 2 kv + n f (the inner states; n = 3 with a gate, 2 without), and where linear layers are
    trained or edited their inputs, 2 d + q + f; trained norms keep 2 d more. q and kv are widths of queries and keys.
Source: counted with torch's saved-tensor hooks (torch 2.13, transformers 5.23); compared with the peak of processes of
    three model sizes, see tests/recipes/test_memory.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

HEAD_ROWS: Final = 256
"""Rows of the head's chunk (kernels/head.py), whose logits are the only ones that exist."""

_WIDE: Final = 4
"""Bytes of a float32 number: masters, gradients, logits, and what norms keep."""


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """The sizes of a decoder, in numbers; `bytes` is the size of one number that it computes with.

    `query` and `key_value` are head count times head size. `gated` is whether the feed-forward has a gate.
    """

    layers: int
    hidden: int
    inner: int
    query: int
    key_value: int
    heads: int
    vocabulary: int
    gated: bool
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is trained and what goes through the model at once.

    `edited` is the share of linear layers that an adapter edits or that are trained themselves. `squares` is how many
    numbers attention keeps for each pair of tokens of a row and each head; flash attention keeps none. `masked` is
    whether rows see something before their own tokens (a learned prefix), so that attention needs a mask of such pairs.
    `fused` is whether our operations run the blocks; `ranks` is then the sum of the ranks of a block's adapters.
    """

    tokens: int
    predicted: int
    longest: int
    edited: float = 1.0
    trains_base: bool = False
    squares: int = 0
    masked: bool = False
    fused: bool = False
    ranks: int = 0


def activations(decoder: Decoder, work: Work) -> int:
    """What the largest micro-batch keeps for its backward pass, and the widest tensor at work beside it."""
    number = decoder.bytes
    if work.fused:
        return _fused(decoder, work)
    norms = 2 * decoder.hidden * _WIDE + 2 * decoder.hidden * number * work.trains_base
    attention = (2 * decoder.query + 2 * decoder.key_value) * number + decoder.heads * _WIDE
    inner = (3 if decoder.gated else 2) * decoder.inner * number
    inputs = int(work.edited * (2 * decoder.hidden + decoder.query + decoder.inner) * number)
    squares = (work.squares * decoder.heads + work.masked) * work.longest * number
    block = work.tokens * (norms + attention + inner + inputs + squares)
    last = work.tokens * decoder.hidden * number
    return decoder.layers * block + last + work.tokens * decoder.inner * number


def _fused(decoder: Decoder, work: Work) -> int:
    number = decoder.bytes
    attention = (2 * decoder.query + 2 * decoder.key_value) * number + decoder.heads * _WIDE
    # A learned root is joined to the keys and values of each row, and what its attention gives is put together anew.
    attention += work.masked * (decoder.query * number + work.longest * number)
    stream = 2 * (decoder.hidden * number + _WIDE) + work.ranks * number
    inner = 2 * decoder.inner * number
    first = work.tokens * (attention + stream + inner)
    last = work.tokens * (attention + stream) + work.predicted * inner
    # Of the last block's heads the chosen rows are a copy; the last norm and the head keep a state each.
    states = decoder.query * number + decoder.hidden * (_WIDE + number + work.trains_base * number)
    passing = work.tokens * decoder.inner * number
    return (decoder.layers - 1) * first + last + work.predicted * states + passing


def on_heap(live: int, work: Work) -> int:
    """Resident memory of `live` bytes of activations in the C library's heap.

    glibc 2.36 cannot use a freed place again for an aligned tensor of the same size, so what a forward pass frees
    between what it keeps stays resident. Measured with torch 2.13 at hidden sizes 192 to 512 and 1,024 and 4,096
    tokens: 1.6 to 2.0 times what lives where the base is frozen and edited, 1.4 to 1.6 where it is only frozen, and 1.0
    to 1.3 where it is trained, since nearly everything is kept then. Fused blocks: 1.2 to 1.4 times.
    """
    if work.fused:
        return int(live * 1.3)
    return int(live * (1.2 if work.trains_base else 1.45 + 0.2 * work.edited))


def head(decoder: Decoder, work: Work) -> int:
    """The chunk of logits at work, and the states of the tokens that are predicted.

    A chunk lives beside the last one and its own exponentials. A head that is trained adds its gradient, and a chunk's
    part of it before and after scaling.
    """
    rows, number = min(HEAD_ROWS, work.predicted), decoder.bytes
    logits = rows * decoder.vocabulary * _WIDE
    rounded = rows * decoder.vocabulary * number if number < _WIDE else 0
    passing = (3 if work.predicted > rows else 2) * logits + rounded
    gradient = decoder.vocabulary * decoder.hidden * (_WIDE + 2 * number)
    states = 2 * work.predicted * decoder.hidden * number
    return states + (max(passing, 2 * logits + rounded + gradient) if work.trains_base else passing)


def masters(parameters: int, number: int) -> int:
    """Float32 copies of trained parameters of `number` bytes each; float32 needs none."""
    return 0 if number >= _WIDE else _WIDE * parameters


def gradients(parameters: int) -> int:
    """Gradients are added up in float32, whatever the parameters are in."""
    return _WIDE * parameters


def staging(parameters: int, optimizer_bytes: int) -> int:
    """The copy of masters and optimizer state from which a checkpoint is written while training goes on."""
    return _WIDE * parameters + optimizer_bytes


def checkpoint(parameters: int, optimizer_bytes: int, *, tensors: int, rows: int) -> int:
    """The files of one checkpoint: masters, optimizer state, names, generators, and a number for each training row."""
    names, generators, row = 3 * 220 * tensors, 24_000, 32
    return _WIDE * parameters + optimizer_bytes + names + generators + row * rows


def kept_checkpoints(keep: int, saves: int) -> int:
    """How many are on the disk at once: those kept, the best, the last, and the one being written."""
    return min(keep + 3, saves)


def token_cache(tokens: int, rows: int) -> int:
    """The rendered rows: token, weight, role and the two ends of its text for each token, row and offset for each."""
    return tokens * (4 + 4 + 1 + 8) + rows * (4 + 8) + 6 * 128
