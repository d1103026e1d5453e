"""The number formats of GGUF files: rows of real numbers as blocks of few bits, and back.

Idea: a block of 32 numbers shares a scale; a super-block of 256 has small scales of its own, kept in 6 or 8 bits below
one float16. Whatever the format, what a reader computes is a product and a sum, so packing is the search for the whole
numbers (and scales) whose product lies nearest.
Equation: Q8_0: x ~ d q, d = max |x| / 127; Q4_0: x ~ d (q - 8), d = -m / 8 for the m of largest |m|;
    Q4_K: x ~ (D s) q - (M t), 8 parts of 32 with s, t in 0..63, q in 0..15; Q6_K: x ~ (D s) (q - 32), 16 parts of 16
    with s in -128..127, q in 0..63.
Source: the layout of the blocks is that of ggml (ggml-common.h) as the gguf package reads them; Q8_0 and Q4_0 give the
    bytes that ggml gives. For Q4_K and Q6_K many encodings are valid: scales are found here by least squares over a
    grid, and the error has a bound (`error_bound`).
Cost: bytes per number: F32 4, F16 and BF16 2, Q8_0 34/32, Q6_K 210/256, Q4_K 144/256, Q4_0 18/32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from luthier.core.errors import NumericError

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
_PIECE: Final = 2**21
"""Numbers that are packed at once, so that work memory does not grow with a tensor."""
_GRID: Final = tuple(step / 5 for step in range(-5, 6))
"""Levels more or fewer that a scale is tried for; more steps gain less than a hundredth of the error."""


@dataclass(frozen=True, slots=True)
class Format:
    """A number format: its number in files, how many numbers share a block, and the bytes of one."""

    name: str
    code: int
    block: int
    bytes: int

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` numbers, a multiple of the block."""
        return columns // self.block * self.bytes


FORMATS: Final = {
    each.name: each
    for each in (
        Format("F32", 0, 1, 4),
        Format("F16", 1, 1, 2),
        Format("Q4_0", 2, 32, 18),
        Format("Q8_0", 8, 32, 34),
        Format("Q4_K", 12, 256, 144),
        Format("Q6_K", 14, 256, 210),
        Format("BF16", 30, 1, 2),
    )
}
BY_CODE: Final = {each.code: each for each in FORMATS.values()}


def pack(values: Tensor, kind: Format) -> bytes:
    """The rows of `values`, one behind another, in the format `kind`; whole blocks only.

    Raises NumericError for numbers that are not finite, or too large for the format.
    """
    flat = values.detach().cpu().reshape(-1)
    pieces = [_packed(flat[start : start + _PIECE], kind) for start in range(0, flat.numel(), _PIECE)]
    return b"".join(pieces)


def unpack(data: bytes | memoryview, kind: Format) -> Tensor:
    """The numbers of whole blocks, in float32; what is read there, exactly as readers of the format compute it."""
    raw = np.frombuffer(data, np.uint8)
    if kind.name == "BF16":
        return torch.from_numpy(raw.copy()).view(torch.bfloat16).float()
    if kind.name in ("F32", "F16"):
        return torch.from_numpy(raw.view("<f4" if kind.name == "F32" else "<f2").astype(np.float32))
    blocks = raw.reshape(-1, kind.bytes)
    return torch.from_numpy(_READERS[kind.name](blocks).reshape(-1))


def error_bound(values: Tensor, kind: Format) -> Tensor:
    """The largest error that `kind` may make at each of `values` (n,), in closed form; n is a multiple of the block.

    Where the format rounds to whole numbers: half a step, and what its rounded scales add.
    """
    flat = values.detach().cpu().reshape(-1).float()
    if kind.name == "F32":
        return torch.zeros_like(flat)
    if kind.name in ("F16", "BF16"):
        # Half a unit in the last place; below the smallest normal number of float16 the steps stay the same.
        return flat.abs() * (2.0**-11 if kind.name == "F16" else 2.0**-8) + (2.0**-25 if kind.name == "F16" else 0)
    blocks = flat.reshape(-1, kind.block)
    top = blocks.abs().amax(1, keepdim=True)
    spread = (blocks.amax(1, keepdim=True).clamp(min=0) - blocks.amin(1, keepdim=True).clamp(max=0)).clamp(min=0)
    # Half a step, one float16 rounding of the scale over all its steps, and float16's smallest step.
    steps = {"Q8_0": top * (0.5 / 127 + 2**-11), "Q4_0": top * (1 / 8 + 2**-10),
             "Q6_K": top * 3.5 / 32, "Q4_K": spread * 2.5 / 15}[kind.name]  # fmt: skip
    return (steps + 127 * 2.0**-24).expand_as(blocks).reshape(-1)


def _packed(values: Tensor, kind: Format) -> bytes:
    if not bool(torch.isfinite(values).all()):
        raise NumericError(
            f"{int((~torch.isfinite(values)).sum())} of {values.numel():,} numbers are not finite",
            allowed="finite weights",
            do="a file of them would answer nothing: train again, or take an earlier checkpoint",
        )
    if kind.name == "BF16":
        return values.to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    numbers = values.float().numpy()
    if kind.name == "F32":
        return numbers.astype("<f4").tobytes()
    if kind.name == "F16":
        return _half(numbers).tobytes()
    return _WRITERS[kind.name](numbers.reshape(-1, kind.block)).tobytes()


def _half(numbers: Floats) -> npt.NDArray[np.float16]:
    with np.errstate(over="ignore"):
        made = numbers.astype("<f2")
    if not np.isfinite(made).all():
        raise NumericError(
            f"a number of {np.abs(numbers).max():.3g}",
            allowed="at most 65504 in float16",
            do="choose BF16 or F32 as the format",
        )
    return made


def _inverse(scale: Floats) -> Floats:
    with np.errstate(divide="ignore"):
        return np.where(scale == 0, np.float32(0), np.float32(1) / scale).astype(np.float32)


def _pack_q8_0(blocks: Floats) -> Bytes:
    scale = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    wanted = blocks * _inverse(scale)
    # Halves away from zero, as in C.
    whole = np.trunc(wanted + np.copysign(np.float32(0.5), wanted))
    return np.concatenate([_half(scale).view(np.uint8), whole.astype(np.int8).view(np.uint8)], 1)


def _read_q8_0(blocks: Bytes) -> Floats:
    return _scales(blocks[:, :2]) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _pack_q4_0(blocks: Floats) -> Bytes:
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(1, keepdims=True), 1)
    scale = largest / np.float32(-8)
    codes = np.trunc(blocks * _inverse(scale) + np.float32(8.5)).clip(0, 15).astype(np.uint8)
    return np.concatenate([_half(scale).view(np.uint8), codes[:, :16] | (codes[:, 16:] << 4)], 1)


def _read_q4_0(blocks: Bytes) -> Floats:
    codes = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], 1)
    return _scales(blocks[:, :2]) * (codes.astype(np.float32) - 8)


def _pack_q4_k(blocks: Floats) -> Bytes:
    parts = blocks.reshape(-1, 8, 32)
    scale, low = _affine(parts, 15)
    big, small = scale.max(1, keepdims=True) / 63, low.max(1, keepdims=True) / 63
    big, small = _half(big).astype(np.float32), _half(small).astype(np.float32)
    six = np.rint(scale * _inverse(big)).clip(0, 63)
    lows = np.rint(low * _inverse(small)).clip(0, 63)
    step, offset = (big * six)[..., None], (small * lows)[..., None]
    codes = np.rint((parts + offset) * _inverse(step)).clip(0, 15).astype(np.uint8).reshape(-1, 4, 2, 32)
    heads = [_half(each).view(np.uint8) for each in (big, small)]
    nibbles = codes[:, :, 0] | (codes[:, :, 1] << 4)
    sixes = _join_sixes(six.astype(np.uint8), lows.astype(np.uint8))
    return np.concatenate([*heads, sixes, nibbles.reshape(-1, 128)], 1)


def _read_q4_k(blocks: Bytes) -> Floats:
    big, small = _scales(blocks[:, 0:2]), _scales(blocks[:, 2:4])
    six, lows = _split_sixes(blocks[:, 4:16])
    nibbles = blocks[:, 16:].reshape(-1, 4, 1, 32)
    codes = np.concatenate([nibbles & 15, nibbles >> 4], 2).reshape(-1, 8, 32).astype(np.float32)
    step, offset = (big * six.astype(np.float32))[..., None], (small * lows.astype(np.float32))[..., None]
    return (step * codes - offset).reshape(-1, 256)


def _join_sixes(six: Bytes, lows: Bytes) -> Bytes:
    """Eight scales and eight offsets of 6 bits in twelve bytes: the last four of each are spread over the others."""
    first = (six[:, :4] & 63) | ((six[:, 4:] >> 4) << 6)
    second = (lows[:, :4] & 63) | ((lows[:, 4:] >> 4) << 6)
    return np.concatenate([first, second, (six[:, 4:] & 15) | ((lows[:, 4:] & 15) << 4)], 1)


def _split_sixes(held: Bytes) -> tuple[Bytes, Bytes]:
    first, second, third = held[:, :4], held[:, 4:8], held[:, 8:]
    six = np.concatenate([first & 63, (third & 15) | ((first >> 6) << 4)], 1)
    return six, np.concatenate([second & 63, (third >> 4) | ((second >> 6) << 4)], 1)


def _affine(parts: Floats, levels: int) -> tuple[Floats, Floats]:
    """Scale and offset of each part, both from 0 on, with small squared error of scale q - offset; q in 0..levels.

    Large numbers count more, as their products do. Each step of a grid around the plain scale gives whole numbers, and
    for those the best scale and offset are two linear equations; the best of all is kept.
    """
    weight = np.sqrt((parts**2).mean(-1, keepdims=True)) + np.abs(parts)
    low = np.minimum(parts.min(-1, keepdims=True), 0)
    spread = np.maximum(parts.max(-1, keepdims=True), 0) - low
    best = (spread / levels, -low)
    least = _squares(parts, weight, *best, levels)
    total = weight.sum(-1, keepdims=True)
    for shift in _GRID:
        codes = np.rint((parts - low) * _inverse(spread / np.float32(levels + shift))).clip(0, levels)
        ones, twos = (weight * codes).sum(-1, keepdims=True), (weight * codes * codes).sum(-1, keepdims=True)
        values, products = (weight * parts).sum(-1, keepdims=True), (weight * codes * parts).sum(-1, keepdims=True)
        below = total * twos - ones * ones
        scale = (total * products - ones * values) * _inverse(below)
        offset = (ones * products - twos * values) * _inverse(below)
        # An offset below zero has no place: without one the best scale is a quotient.
        scale = np.where(offset < 0, products * _inverse(twos), scale)
        offset = np.maximum(offset, 0)
        error = np.where(scale > 0, _squares(parts, weight, np.maximum(scale, 0), offset, levels), np.inf)
        better = error < least
        best = (np.where(better, scale, best[0]), np.where(better, offset, best[1]))
        least = np.where(better, error, least)
    return best[0][..., 0].astype(np.float32), best[1][..., 0].astype(np.float32)


def _squares(parts: Floats, weight: Floats, scale: Floats, offset: Floats, levels: int) -> Floats:
    codes = np.rint((parts + offset) * _inverse(scale)).clip(0, levels)
    return (weight * (scale * codes - offset - parts) ** 2).sum(-1, keepdims=True)


def _pack_q6_k(blocks: Floats) -> Bytes:
    parts = blocks.reshape(-1, 16, 16)
    scale = _symmetric(parts)
    largest = np.take_along_axis(scale, np.abs(scale).argmax(1, keepdims=True), 1)
    big = _half(largest / np.float32(-128)).astype(np.float32)
    small = np.rint(scale * _inverse(big)).clip(-128, 127)
    codes = (np.rint(parts * _inverse((big * small)[..., None])).clip(-32, 31) + 32).astype(np.uint8)
    # Halves of 128: in each, four runs of 32 whose low nibbles share 64 bytes and whose high bits share 32.
    runs = codes.reshape(-1, 2, 4, 32)
    low = np.concatenate([(runs[:, :, 0] & 15) | ((runs[:, :, 2] & 15) << 4),
                          (runs[:, :, 1] & 15) | ((runs[:, :, 3] & 15) << 4)], -1)  # fmt: skip
    high = sum((runs[:, :, part] >> 4) << (2 * part) for part in range(4))
    return np.concatenate([low.reshape(-1, 128), np.asarray(high, np.uint8).reshape(-1, 64),
                           small.astype(np.int8).view(np.uint8), _half(big).view(np.uint8)], 1)  # fmt: skip


def _read_q6_k(blocks: Bytes) -> Floats:
    low, high = blocks[:, :128].reshape(-1, 2, 64), blocks[:, 128:192].reshape(-1, 2, 32)
    halves = (low[..., :32] & 15, low[..., 32:] & 15, low[..., :32] >> 4, low[..., 32:] >> 4)
    runs = [half | (((high >> (2 * part)) & 3) << 4) for part, half in enumerate(halves)]
    codes = np.stack(runs, 2).reshape(-1, 16, 16).astype(np.float32) - 32
    step = _scales(blocks[:, 208:]) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return (step[..., None] * codes).reshape(-1, 256)


def _symmetric(parts: Floats) -> Floats:
    """The scale of each part with small squared error of scale q, q in -32..31, by least squares over a grid."""
    largest = np.take_along_axis(parts, np.abs(parts).argmax(-1)[..., None], -1)
    weight = parts**2
    best, most = largest / np.float32(-32), np.zeros_like(largest)
    for shift in _GRID:
        codes = np.rint(parts * _inverse(largest / np.float32(-32 + shift))).clip(-32, 31)
        fitted, squares = (weight * parts * codes).sum(-1, keepdims=True), (weight * codes**2).sum(-1, keepdims=True)
        # With the best scale the squared error is the same for all but this term, which it is smaller by.
        gain = fitted * fitted * _inverse(squares)
        best = np.where(gain > most, fitted * _inverse(squares), best)
        most = np.maximum(gain, most)
    return best[..., 0].astype(np.float32)


def _scales(two_bytes: Bytes) -> Floats:
    return np.ascontiguousarray(two_bytes).view("<f2").astype(np.float32)


_WRITERS: Final[dict[str, Callable[[Floats], npt.NDArray[Any]]]] = {
    "Q8_0": _pack_q8_0, "Q4_0": _pack_q4_0, "Q4_K": _pack_q4_k, "Q6_K": _pack_q6_k,
}  # fmt: skip
_READERS: Final[dict[str, Callable[[Bytes], Floats]]] = {
    "Q8_0": _read_q8_0, "Q4_0": _read_q4_0, "Q4_K": _read_q4_k, "Q6_K": _read_q6_k,
}  # fmt: skip
