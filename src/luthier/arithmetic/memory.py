"""Memory and disk of a training run in bytes, from sizes alone.

Idea: what a backward pass needs is decided by the shapes of a decoder block, so the peak of a step can be told before
it is made. Counted is what autograd keeps until a layer's backward pass, tensor by tensor, for a block of attention and
feed-forward, each of them run by our operations (kernels/blocks.py), or as the zoo writes it where an edit sends it
there, with flash attention over segments. Blocks of any other shape have counts instead (counted.py).
Equation: a fused block keeps for each token 2 d (the residual stream before each half) + 2 q + 2 kv (queries, keys,
    values and the attention's output) + 2 f (gate and up), one number a norm and head, and the ranks of its adapters;
    the last block's feed-forward does for the tokens that predict something; a recomputed block keeps d. The zoo's
    block keeps 2 d in float32 (what the norms see) + 2 q + 2 kv + n f (the inner states; n = 3 with a gate, 2 without),
    and what edits or trained layers keep, at most 2 d + q + f where that is their inputs; trained norms keep 2 d more.
    Norms of heads keep q + kv more, the zoo's in float32. Blocks below the lowest edit keep nothing. q and kv are
    widths of queries and keys. A peak is the widest of: all that is kept, with a chunk of the head at work; what is
    kept below a block and by it, with the gradients of gate and up, 2 f, of the norm and the stream, 2 d, and the norm
    made again, d, of its feed-forward at work; or with those of its attention, 2 q + 2 kv + d.
Source: counted with torch's saved-tensor hooks and its profiler of memory (torch 2.13, transformers 5.23): within 4 %
    of the peak of tensors for every adapter; and of processes, see tests/recipes/test_memory.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

HEAD_ROWS: Final = 256
"""Rows of the head's chunk (kernels/head.py), whose logits are the only ones that exist."""

UNDER_WAY: Final = 2
"""Inputs that are on the device where they lie with the host: one at work, one on its way; see
model/running/far_inputs.py."""

_WIDE: Final = 4
"""Bytes of a float32 number: masters, gradients, logits, and what norms keep."""


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """The sizes of a decoder, in numbers; `bytes` is the size of one number that it computes with.

    `query` and `key_value` are head count times head size. `gated` is whether the feed-forward has a gate,
    `normed_heads` whether each head of queries and keys goes through a norm.
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
    normed_heads: bool = False


@dataclass(frozen=True, kw_only=True)
class Output:
    """How the head works: whether its slopes replace its logits, how many rows of it are trained where it is frozen,
    whether something is done to its logits, in float32, whether it shares its weight with the embedding, and whether
    the norm before it is ours though blocks are not, so that it sees only the rows that are predicted."""

    in_place: bool = False
    rows: int = 0
    wide: bool = False
    tied: bool = False
    own_norm: bool = False


@dataclass(frozen=True, kw_only=True)
class Ours:
    """Which halves of all blocks our operations run; the model zoo's run the others."""

    attention: bool = False
    feed_forward: bool = False

    @property
    def everything(self) -> bool:
        """Whether that is both."""
        return self.attention and self.feed_forward


@dataclass(frozen=True, kw_only=True)
class Recomputed:
    """How many of the first blocks are recomputed, so that they keep only their input, and whether that lies `far`, in
    the host's memory."""

    blocks: int = 0
    far: bool = False


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is trained and what goes through the model at once.

    `edits` is how many numbers a token and block edits and trained layers keep, beside those of the base. `squares` is
    how many numbers attention keeps for each pair of tokens of a row and each head; flash attention keeps none.
    `untouched` is how many of the first blocks lie below everything that is trained. `masked` is whether rows see
    something before their own tokens (a learned prefix), so that attention needs a mask of such pairs. `ours` is what
    our operations run of the blocks. `recomputed` says how many blocks keep only their input.
    """

    tokens: int
    predicted: int
    longest: int
    edits: float = 0.0
    trains_base: bool = False
    squares: float = 0.0
    untouched: int = 0
    masked: bool = False
    ours: Ours = Ours()
    recomputed: Recomputed = Recomputed()
    output: Output = Output()

    @property
    def last_tokens(self) -> int:
        """Tokens that go through the last feed-forward."""
        return self.predicted if self.ours.everything else self.tokens


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The widest moment of a pass: what is kept for the backward pass, and what is at work beside it."""

    kept: int
    working: int

    @property
    def total(self) -> int:
        """Bytes of both."""
        return self.kept + self.working


def peak(decoder: Decoder, work: Work) -> Peak:
    """The moment of a micro-batch's forward and backward pass at which most is alive."""
    return max(_moments(decoder, work), key=lambda moment: moment.total)


def kept(decoder: Decoder, work: Work) -> int:
    """What autograd holds when the forward pass has ended, by the head or by a block."""
    if work.recomputed.blocks == decoder.layers:
        return _below(decoder, work, decoder.layers) + _states(decoder, work)
    last = _last_block(decoder, work) if work.untouched < decoder.layers else 0
    return _below(decoder, work, decoder.layers - 1) + last + _states(decoder, work)


def _moments(decoder: Decoder, work: Work) -> Iterator[Peak]:
    """The head, with all that is kept; the backward passes of the last block, of the one below, of a recomputed one.

    A block that is recomputed is made again, and then goes backward as any other. Lower blocks need no more than the
    one that comes first, since those above them are gone by then.
    """
    everything, layers, again = kept(decoder, work), decoder.layers, work.recomputed.blocks
    block, last = _block(decoder, work), _last_block(decoder, work)
    yield Peak(kept=everything, working=head_at_work(decoder, work))
    made = last if again == layers else 0
    below = everything + made - _states(decoder, work)
    yield Peak(kept=below, working=_feed_forward_backward(decoder, work, work.last_tokens))
    below -= work.last_tokens * _inner(decoder, work)
    yield Peak(kept=below, working=_attention_backward(decoder, work))
    for at in {layers - 2, again - 1} - {-1}:
        # The blocks up to this one, and the inside of it if it has to be made again.
        before = _below(decoder, work, at + 1) + (block if at < again else 0)
        widest = max(_feed_forward_backward(decoder, work, work.tokens), _attention_backward(decoder, work))
        yield Peak(kept=before, working=widest)


def _below(decoder: Decoder, work: Work, count: int) -> int:
    """What the first `count` blocks keep: nothing, then only their inputs, then all, none of them being the last."""
    silent = min(work.untouched, count)
    again = max(0, min(work.recomputed.blocks, count) - silent)
    near = min(again, UNDER_WAY) if work.recomputed.far else again
    return near * _input(decoder, work) + (count - silent - again) * _block(decoder, work)


def far_inputs(decoder: Decoder, work: Work) -> int:
    """What a pass leaves in the host's memory."""
    again = max(0, work.recomputed.blocks - work.untouched)
    return again * _input(decoder, work) if work.recomputed.far else 0


def _input(decoder: Decoder, work: Work) -> int:
    """What is kept of a recomputed block: the residual stream that goes into it."""
    return work.tokens * decoder.hidden * decoder.bytes


def _block(decoder: Decoder, work: Work) -> int:
    """What any block but the last one keeps."""
    return work.tokens * (_around(decoder, work) + _inner(decoder, work))


def _last_block(decoder: Decoder, work: Work) -> int:
    """The last block keeps its feed-forward for the rows that are asked for only, where we run it."""
    block = work.tokens * _around(decoder, work) + work.last_tokens * _inner(decoder, work)
    unasked = (work.tokens - work.predicted) * (decoder.hidden * decoder.bytes + _WIDE)
    # Of its heads the chosen rows are a copy.
    return block - unasked + work.predicted * decoder.query * decoder.bytes if work.ours.everything else block


def _around(decoder: Decoder, work: Work) -> int:
    """Bytes that attention, the norms and the adapters' thin products keep of a token."""
    number = decoder.bytes
    attention = (2 * decoder.query + 2 * decoder.key_value) * number + decoder.heads * _WIDE
    norms = _norm(decoder, work, decoder.hidden, ours=work.ours.attention)
    norms += _norm(decoder, work, decoder.hidden, ours=work.ours.feed_forward)
    if decoder.normed_heads:
        norms += _norm(decoder, work, decoder.query + decoder.key_value, ours=work.ours.attention)
    edits = int(work.edits * number)
    if work.ours.everything:
        # A learned root is joined to the keys and values of each row, and what its attention gives is put together.
        attention += work.masked * (decoder.query * number + work.longest * number)
        return attention + norms + edits
    squares = int((work.squares * decoder.heads + work.masked) * work.longest * number)
    return norms + attention + edits + squares


def _norm(decoder: Decoder, work: Work, width: int, *, ours: bool) -> int:
    """Bytes that a norm keeps of a token: what it sees, which the zoo's sees in float32, and what that came to."""
    if ours:
        return width * decoder.bytes + _WIDE
    return width * (_WIDE + decoder.bytes * work.trains_base)


def _inner(decoder: Decoder, work: Work) -> int:
    """Bytes that the inside of a feed-forward keeps of a token."""
    if work.ours.feed_forward:
        return 2 * decoder.inner * decoder.bytes
    return (3 if decoder.gated else 2) * decoder.inner * decoder.bytes


def _states(decoder: Decoder, work: Work) -> int:
    """What lies between the last block and the loss: rows of the stream, what the last norm keeps, the head's state."""
    number = decoder.bytes
    # Trained rows of a head need the states once more, and the slope of each of them.
    head = work.predicted * (decoder.hidden * number * (2 if work.output.rows else 1) + work.output.rows * _WIDE)
    if work.ours.everything or work.output.own_norm:
        return head + work.predicted * (decoder.hidden * number + _WIDE)
    # The zoo's last norm sees all tokens, and works in float32.
    return head + work.tokens * decoder.hidden * (_WIDE + number + work.trains_base * number)


def _feed_forward_backward(decoder: Decoder, work: Work, tokens: int) -> int:
    """Beside what a block keeps: the gradients of gate and up, of the stream and of the norm, the norm made again."""
    number = decoder.bytes
    wide = 2 * decoder.inner + 3 * decoder.hidden if work.ours.feed_forward else 3 * decoder.inner + 2 * decoder.hidden
    return tokens * wide * number + own_gradients(decoder, work)


def own_gradients(decoder: Decoder, work: Work) -> int:
    """Gradients of a feed-forward's weights where they are trained, before they are added to those of earlier passes.

    That of a tied head waits for the embedding's.
    """
    weights = 3 * decoder.inner + work.output.tied * decoder.vocabulary
    return weights * decoder.hidden * decoder.bytes * work.trains_base


def _attention_backward(decoder: Decoder, work: Work) -> int:
    """The gradients of the stream, heads, queries, keys and values; beside a learned root row by row, then whole."""
    number, heads = decoder.bytes, decoder.query + 2 * decoder.key_value
    joined = heads * work.masked
    return work.tokens * (max(decoder.query + heads, 3 * decoder.hidden) + decoder.hidden + joined) * number


def head_at_work(decoder: Decoder, work: Work) -> int:
    """A chunk of logits at work beside the one before it, and the states that it is made from.

    Slopes take the place of logits where `in_place`; that of float32 logits, beside the rounded ones, where rows are
    trained or the logits are changed (a bias, a factor, a cap); else they are float32 with exponentials beside them. A
    head that is trained keeps the slopes of whole chunks in as much memory as its gradient takes, and adds that
    gradient and a chunk's part of it before and after scaling.
    """
    rows, number = min(HEAD_ROWS, work.predicted), decoder.bytes
    chunks = 2 if work.predicted > rows else 1
    rounded = number if number < _WIDE else 0
    each = chunks * _WIDE + rounded if work.output.rows or work.output.wide else chunks * number
    passing = rows * decoder.vocabulary * (each if work.output.in_place else (chunks + 1) * _WIDE + rounded)
    states = work.predicted * decoder.hidden * number
    if not work.trains_base:
        return states + passing
    most = decoder.hidden * _WIDE // number
    kept_rows = work.predicted if work.predicted <= most else most // HEAD_ROWS * HEAD_ROWS
    if kept_rows == work.predicted:
        # The last of them are those at work.
        kept_rows = max(0, kept_rows - chunks * rows)
    slopes = kept_rows * decoder.vocabulary * number
    return 2 * states + slopes + passing + decoder.vocabulary * decoder.hidden * (_WIDE + 2 * rounded)


def libraries(number: int, *, threads: int = 1, ours: bool = False) -> int:
    """What the libraries that multiply matrices on a CPU take for themselves, whatever the size of the model.

    Measured over hidden sizes of 256 to 768, all adapters and tasks (tests/recipes/memory_peak.py) on a Zen 4: float32
    3 to 15 MB, and 8 MB for a second thread, which packs what it multiplies for itself; bfloat16, for which oneDNN
    writes machine code for each shape of a product, 5 to 27 MB with its caches bounded (kernels/pool.py), and at most
    11 MB where blocks are `ours` and so nearly all products (kernels/many.py).
    """
    return 8_000_000 * threads if number >= _WIDE else 2_000_000 if ours else 13_000_000


def on_heap(live: int) -> int:
    """Resident memory of `live` bytes of activations where they lie in the C library's heap and not in the pool.

    glibc 2.36 cannot use a freed place again for an aligned tensor of the same size while something small lies beside
    it. Measured with torch 2.13 after four passes in float32, hidden sizes 256 and 384: 1.1 to 1.5 times what lives.
    """
    return int(live * 1.3)


def masters(parameters: int, number: int) -> int:
    """Float32 copies of trained parameters of `number` bytes each; float32 needs none."""
    return 0 if number >= _WIDE else _WIDE * parameters


def gradients(parameters: int) -> int:
    """Gradients are added up in float32, whatever the parameters are in."""
    return _WIDE * parameters


def far_optimizer(parameters: int, optimizer_bytes: int) -> int:
    """What lies with the host that steps: masters, gradients, what the optimizer keeps, and a checkpoint's copy."""
    return _WIDE * parameters + gradients(parameters) + optimizer_bytes + staging(parameters, optimizer_bytes)


def gradients_under_way(largest: int) -> int:
    """Bytes of gradients on a device whose host steps: one has just come, one is on its way; `largest` is the most that
    a parameter takes."""
    return 2 * largest


def staging(parameters: int, optimizer_bytes: int) -> int:
    """The copy of masters and optimizer state from which a checkpoint is written while training goes on."""
    return _WIDE * parameters + optimizer_bytes


def saving(copy: int, *, meanwhile: bool, freed: int) -> int:
    """What such a copy adds to the peak of a run. At the end it lies where gradients and passes were: `freed` bytes."""
    return copy if meanwhile else max(0, copy - freed)


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
