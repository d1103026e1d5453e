"""Inference in closed formulas: weights, the cache of keys and values, when decoding waits for memory, what fits.

Idea: a step of decoding reads every weight once for all rows, and each row's own cache; with few rows that is all it
costs, with many the products are. So memory bounds how many rows there may be, and bandwidth how fast few of them are.
Equation: cache of a token: 2 L c bytes-a-number, c = key-value heads head_size; a layer with a window keeps w tokens at
    most. Step: max(W + rows cache, over bandwidth; rows (2 N + 4 L a context), over FLOPs a second). Ridge: FLOPs a
    second / bandwidth, in rows, for weights of two bytes. Rows that fit: (memory - W) / (cache of a context). Rule of
    thumb: 1.2 W, which leaves the cache out.
Source: kipp.ly/transformer-inference-arithmetic; EleutherAI's transformer-math (the rule); Pope et al., arXiv
    2211.05102, section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from luthier.arithmetic.shapes import Shape

RULE_OF_THUMB: Final = 1.2
"""What handbooks multiply weights by for inference, caches left out."""

PackedBytes = Callable[[tuple[int, int]], int | None]
"""Bytes of a packed matrix (out, in); None where it stays as it is."""


def weight_bytes(shape: Shape, number: int, packed: PackedBytes | None = None) -> int:
    """Bytes of all weights: matrices of blocks as they are packed, all others in numbers of `number` bytes.

    A head that is the token table counts once.
    """
    blocks = 0
    for matrix in shape.matrices:
        size = packed((matrix.outputs, matrix.inputs)) if packed is not None and matrix.linear else None
        blocks += matrix.count * (matrix.outputs * matrix.inputs * number if size is None else size)
    return blocks + (shape.parameters - shape.blocks) * number


def cache_bytes_per_token(shape: Shape, number: int = 2) -> int:
    """Keys and values of one token in all layers."""
    return 2 * number * shape.layers * shape.key_value


def cache_bytes(shape: Shape, context: int, number: int = 2) -> int:
    """Keys and values of one text of so many tokens; a layer with a window keeps no more than that."""
    seen = sum(context if window is None else min(context, window) for window in shape.windows)
    return 2 * number * shape.key_value * seen


def rule_of_thumb(weights: float) -> float:
    """Bytes for inference as handbooks tell them."""
    return RULE_OF_THUMB * weights


def ridge(flops_per_second: float, bytes_per_second: float, *, number: int = 2) -> float:
    """Rows at which a step of decoding takes as long for its products as for reading the weights."""
    return flops_per_second / bytes_per_second * number / 2


def decode_flops(shape: Shape, context: int) -> float:
    """FLOPs of one new token that sees so many."""
    seen = sum(context if window is None else min(context, window) for window in shape.windows)
    return 2 * (shape.active + shape.table) + 4 * shape.query * seen


def decode_seconds(
    shape: Shape, *, weights: float, rows: int, context: int, flops_per_second: float, bytes_per_second: float,
    number: int = 2,
) -> float:  # fmt: skip
    """The least time of a step that adds a token to each of `rows` texts of `context` tokens."""
    # Of a table that is no head one row is read for each token.
    looked_up = 0 if shape.tied else shape.table * number
    read = weights - looked_up + rows * cache_bytes(shape, context, number)
    return max(read / bytes_per_second, rows * decode_flops(shape, context) / flops_per_second)


def prefill_flops(shape: Shape, tokens: int) -> float:
    """FLOPs of reading a text before its first answer: the head is asked for the last token alone."""
    attended = sum(_pairs(tokens, window) for window in shape.windows)
    return 2 * shape.active * tokens + 2 * shape.table + 4 * shape.query * attended


def most_rows(memory: float, *, weights: float, cache: float) -> int:
    """How many texts fit beside the weights, each with a cache of so many bytes."""
    return max(0, int((memory - weights) // cache))


def _pairs(tokens: int, window: int | None) -> int:
    """Pairs of a token and one that it sees, itself included."""
    if window is None or tokens <= window:
        return tokens * (tokens + 1) // 2
    return window * (window + 1) // 2 + (tokens - window) * window
