"""The row operations of the contract as Triton kernels: what triton_backend.py launches.

Idea: each is one pass over memory, a tile of rows and columns to a program, summed in float32 whatever the rows are
kept in; the log-probabilities take two passes over a row, because a row of the vocabulary fits no multiprocessor.
Rounding: everything is float32 from the load to the store. Where the zoo rounds in between (after the norm, after the
activation, after the first product of a rotation), the kernel rounds there too; gradients are rounded once, at the end.
Arithmetic on bfloat16 itself is never written: Triton's interpreter, in which these kernels are tested, gets it wrong
without a word (a test reads this file for it). No autotuning and no libdevice, which need a GPU to be there.
Importing this file imports triton: only `TritonBackend.build` does. Compiled for GPUs, not yet run on one.
Source: the formulas are those of torch_backend.py; a running maximum and sum, Milakov and Gimelshein, arXiv 1805.02867.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def norm(x, weight, out, inverse, n, d, x_stride, eps, KNOWN: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """`weight` x / rms(x), and 1 / rms(x) unless that is KNOWN; `out` is contiguous."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    inside = (rows < n)[:, None] & (columns < d)[None, :]
    numbers = tl.load(x + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if KNOWN:
        scale = tl.load(inverse + rows, mask=rows < n, other=0.0).to(tl.float32)
    else:
        scale = tl.rsqrt(tl.sum(numbers * numbers, 1) / d + eps)
        tl.store(inverse + rows, scale, mask=rows < n)
    factor = tl.load(weight + columns, mask=columns < d, other=0.0).to(tl.float32)
    unit = (numbers * scale[:, None]).to(out.dtype.element_ty).to(tl.float32)
    result = unit * factor[None, :]
    tl.store(out + rows[:, None] * d + columns[None, :], result.to(out.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def norm_backward(
    grad, x, weight, inverse, added, out, n, d, grad_stride, x_stride, added_stride,
    ADDED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """inverse (s - u mean(s u)) + added, for s = grad weight and u = x inverse; `out` is contiguous."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    inside = (rows < n)[:, None] & (columns < d)[None, :]
    scale = tl.load(inverse + rows, mask=rows < n, other=0.0).to(tl.float32)[:, None]
    factor = tl.load(weight + columns, mask=columns < d, other=0.0).to(tl.float32)
    unit = tl.load(x + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32) * scale
    upper = tl.load(grad + rows[:, None] * grad_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    slope = upper * factor[None, :]
    along = tl.sum(slope * unit, 1)[:, None] / d
    result = (slope - unit * along) * scale
    if ADDED:
        place = added + rows[:, None] * added_stride + columns[None, :]
        result += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + rows[:, None] * d + columns[None, :], result.to(out.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def gated(gate, up, out, n, f, gate_stride, up_stride, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """silu(gate) up; `out` is contiguous."""
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = (tl.program_id(1) * WIDTH + tl.arange(0, WIDTH))[None, :]
    inside = (rows < n) & (columns < f)
    z = tl.load(gate + rows * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(up + rows * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    bent = (z / (1.0 + tl.exp(-z))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + rows * f + columns, (bent * factor).to(out.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def gated_backward(grad, gate, up, grad_up, n, f, gate_stride, up_stride, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The gradients of gate, which take the place of `grad`, and of up; both are contiguous."""
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = (tl.program_id(1) * WIDTH + tl.arange(0, WIDTH))[None, :]
    inside = (rows < n) & (columns < f)
    upper = tl.load(grad + rows * f + columns, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(gate + rows * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(up + rows * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    open_share = 1.0 / (1.0 + tl.exp(-z))
    through = upper * factor * open_share * (1.0 + z * (1.0 - open_share))
    tl.store(grad + rows * f + columns, through.to(grad.dtype.element_ty), mask=inside)
    tl.store(grad_up + rows * f + columns, (upper * z * open_share).to(grad_up.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def rotated(
    x, cosines, sines, out, n, heads, half, token_stride, head_stride, cosine_stride, sine_stride,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The halves of each head turned against each other; a row is one head of one token, `out` is contiguous."""
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = tl.arange(0, WIDTH)[None, :]
    inside = (rows < n * heads) & (columns < half)
    token, head = rows // heads, rows % heads
    place = x + token * token_stride + head * head_stride + columns
    first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(place + half, mask=inside, other=0.0).to(tl.float32)
    cosine = tl.load(cosines + token * cosine_stride + columns, mask=inside, other=0.0).to(tl.float32)
    sine = tl.load(sines + token * sine_stride + columns, mask=inside, other=0.0).to(tl.float32)
    low = (first * cosine).to(out.dtype.element_ty).to(tl.float32) - second * sine
    high = (second * cosine).to(out.dtype.element_ty).to(tl.float32) + first * sine
    goal = out + rows * (2 * half) + columns
    tl.store(goal, low.to(out.dtype.element_ty), mask=inside)
    tl.store(goal + half, high.to(out.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def label_slopes(
    logits, labels, log_probs, size, row_stride, SLOPES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """log p(label) of a row; its slope takes the place of the logits when SLOPES are asked."""
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * row_stride
    label = tl.load(labels + row).to(tl.int64)
    # Before any of the row is written over: the sums below make every thread wait for it.
    chosen = tl.load(start + label).to(tl.float32)
    most = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for first in range(0, size, WIDTH):
        columns = first + tl.arange(0, WIDTH)
        numbers = tl.load(start + columns, mask=columns < size, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(most, tl.max(numbers, 0))
        # A row may begin with entries of -inf; -inf less itself would be NaN.
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(most - shift) + tl.sum(tl.exp(numbers - shift), 0)
        most = larger
    log_sum = most + tl.log(total)
    tl.store(log_probs + row, chosen - log_sum)
    if SLOPES:
        for first in range(0, size, WIDTH):
            columns = first + tl.arange(0, WIDTH)
            inside = columns < size
            numbers = tl.load(start + columns, mask=inside, other=0.0).to(tl.float32)
            slope = tl.where(columns == label, 1.0, 0.0) - tl.exp(numbers - log_sum)
            tl.store(start + columns, slope.to(logits.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def unpacked(codes, scales, levels, out, numbers, block, WIDTH: tl.constexpr):
    """Of each byte the level of its high half and that of its low one, times the scales of the blocks they lie in."""
    pairs = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    first, second = 2 * pairs, 2 * pairs + 1
    both = tl.load(codes + pairs, mask=first < numbers, other=0).to(tl.int32)
    high = tl.load(levels + (both >> 4)).to(tl.float32)
    low = tl.load(levels + (both & 15)).to(tl.float32)
    high *= tl.load(scales + first // block, mask=first < numbers, other=0.0).to(tl.float32)
    low *= tl.load(scales + second // block, mask=second < numbers, other=0.0).to(tl.float32)
    places = tl.program_id(0).to(tl.int64) * (2 * WIDTH) + tl.arange(0, 2 * WIDTH)
    tl.store(out + places, tl.interleave(high, low).to(out.dtype.element_ty), mask=places < numbers)


@triton.jit
@no_type_check
def unpacked_rows(codes, scales, out, n, d, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Whole numbers times the scale of their row; all of it is contiguous."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = (tl.program_id(1) * WIDTH + tl.arange(0, WIDTH))[None, :]
    inside = (rows < n)[:, None] & (columns < d)
    scale = tl.load(scales + rows, mask=rows < n, other=0.0).to(tl.float32)
    places = rows[:, None] * d + columns
    result = tl.load(codes + places, mask=inside, other=0).to(tl.float32) * scale[:, None]
    tl.store(out + places, result.to(out.dtype.element_ty), mask=inside)
