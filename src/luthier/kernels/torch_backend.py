"""The twin: every operation of the contract in plain torch, on any device and in any precision.

Others are tested against this one, and it runs where they cannot: without a compiler, in float64, on devices nobody has
written anything for. Attention is torch's flash attention for CPUs, one call for each run of equal texts, which reads
its part of the flat tensors where it lies and whose result is written to where it belongs.
Source: the roundings are those of transformers' llama; flash attention, arXiv 2205.14135.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int8, UInt8
from torch import Tensor

from luthier.kernels.backend import Backend, Paged, PairCodes, Run, Seen
from luthier.kernels.thin import ThinRows, ThinTerms, add_gathered

PIECE = 2**20
"""Codes that are unpacked at once."""


@final
class TorchBackend(Backend):
    """Plain torch."""

    @property
    def name(self) -> str:
        return "blocks"

    def norm(
        self, x: Float[Tensor, "n d"], weight: Float[Tensor, " d"], eps: float
    ) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n 1"]]:
        inverse = x.to(wide(x)).square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        return self.normed(x, weight, inverse), inverse

    def normed(
        self, x: Float[Tensor, "n d"], weight: Float[Tensor, " d"], inverse: Float[Tensor, "n 1"]
    ) -> Float[Tensor, "n d"]:
        return (x.to(wide(x)) * inverse).to(x.dtype).mul_(weight)

    def norm_backward(
        self,
        grad: Float[Tensor, "n d"],
        x: Float[Tensor, "n d"],
        weight: Float[Tensor, " d"],
        inverse: Float[Tensor, "n 1"],
        added: Float[Tensor, "n d"] | None,
    ) -> Float[Tensor, "n d"]:
        unit = x.to(wide(x)) * inverse
        slope = (grad * weight).to(wide(x))
        along = torch.linalg.vecdot(slope, unit)[:, None].div_(-x.shape[-1])
        found = slope.addcmul_(unit, along).mul_(inverse)
        return (found if added is None else found.add_(added)).to(x.dtype)

    def gated(self, gate: Float[Tensor, "n f"], up: Float[Tensor, "n f"]) -> Float[Tensor, "n f"]:
        return F.silu(gate).mul_(up)

    def gated_backward(
        self, grad: Float[Tensor, "n f"], gate: Float[Tensor, "n f"], up: Float[Tensor, "n f"]
    ) -> tuple[Float[Tensor, "n f"], Float[Tensor, "n f"]]:
        grad_up = F.silu(gate).mul_(grad)
        return torch.ops.aten.silu_backward(grad.mul_(up), gate), grad_up

    def rotated(
        self, x: Float[Tensor, "n heads size"], cosines: Float[Tensor, "n half"], sines: Float[Tensor, "n half"]
    ) -> Float[Tensor, "n heads size"]:
        turned = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        first, second = x.chunk(2, -1)
        low, high = turned.chunk(2, -1)
        cosine, sine = cosines[:, None], sines[:, None]
        torch.mul(first, cosine, out=low).addcmul_(second, sine, value=-1)
        torch.mul(second, cosine, out=high).addcmul_(first, sine)
        return turned

    def label_slopes(
        self,
        logits: Float[Tensor, "n V"],
        labels: Int[Tensor, " n"],
        *,
        slopes: bool,
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, "n V"] | None]:
        # Wide from here on: a bfloat16 log-sum over 150,000 entries loses the small ones.
        logits_wide = logits.to(wide(logits))
        normaliser = torch.logsumexp(logits_wide, -1)
        log_probs = logits_wide.gather(1, labels[:, None])[:, 0] - normaliser
        if not slopes:
            return log_probs, None
        slope = logits_wide.sub_(normaliser[:, None]).exp_().neg_()
        slope[torch.arange(len(labels), device=labels.device), labels] += 1
        return log_probs, slope.to(logits.dtype)

    def unpacked(
        self,
        codes: UInt8[Tensor, " pairs"],
        scales: Float[Tensor, " blocks"],
        levels: Float[Tensor, 16],
        block: int,
        numbers: int,
        dtype: torch.dtype,
    ) -> Float[Tensor, " numbers"]:
        return unpacked_pairs(codes, scales, levels, block, numbers, dtype)

    def thin(self, x: Float[Tensor, "n in"], y: Float[Tensor, "n out"], terms: ThinTerms, rows: ThinRows) -> None:
        add_gathered(x, y, terms, rows.short)

    def attends(self, query: Float[Tensor, "n heads size"], seen: Seen | None) -> bool:
        return query.device.type == "cpu" and seen is None

    def attend(
        self,
        query: Float[Tensor, "n heads size"],
        key: Float[Tensor, "m groups size"],
        value: Float[Tensor, "m groups size"],
        runs: Sequence[Run],
        scale: float,
        seen: Seen | None,
    ) -> tuple[Float[Tensor, "n heads size"], tuple[Tensor, ...]]:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        sums = []
        for at, run in _places(runs):
            q, k, v = (_texts(tensor[at], run) for tensor in (query, key, value))
            attended, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, run[1] > 1, scale=scale
            )
            _texts(out[at], run).copy_(attended)
            sums.append(log_sum)
        return out, tuple(sums)

    def attend_backward(
        self,
        grad: Float[Tensor, "n heads size"],
        query: Float[Tensor, "n heads size"],
        key: Float[Tensor, "m groups size"],
        value: Float[Tensor, "m groups size"],
        out: Float[Tensor, "n heads size"],
        kept: Sequence[Tensor],
        runs: Sequence[Run],
        scale: float,
        seen: Seen | None,
    ) -> tuple[Float[Tensor, "n heads size"], Float[Tensor, "m groups size"], Float[Tensor, "m groups size"]]:
        given = (query, key, value)
        grads = [torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in given]
        for (at, run), log_sum in zip(_places(runs), kept, strict=True):
            dy, q, k, v, y = (_texts(tensor[at], run) for tensor in (grad, *given, out))
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                dy, q, k, v, y, log_sum, 0.0, run[1] > 1, scale=scale
            )
            for whole, part in zip(grads, found, strict=True):
                _texts(whole[at], run).copy_(part)
        return grads[0], grads[1], grads[2]

    def attend_pages(
        self,
        query: Float[Tensor, "n heads size"],
        keys: Float[Tensor, "rows groups size"],
        values: Float[Tensor, "rows groups size"],
        texts: Paged,
        scale: float,
        window: int | None,
    ) -> Float[Tensor, "n heads size"]:
        return attended_by_text(query, keys, values, texts, scale, window)

    def product(
        self, x: Float[Tensor, "n in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, "n out"]:
        return F.linear(x, weight, bias)

    @property
    def few(self) -> int:
        return 0

    def product_of_bytes(
        self, x: Float[Tensor, "n in"], codes: Int8[Tensor, "out in"], scales: Float[Tensor, " out"]
    ) -> Float[Tensor, "n out"]:
        return bytes_unpacked_and_multiplied(x, codes, scales)

    def product_of_codes(self, x: Float[Tensor, "n in"], weight: PairCodes) -> Float[Tensor, "n out"]:
        return codes_unpacked_and_multiplied(x, weight)


def bytes_unpacked_and_multiplied(
    x: Float[Tensor, "n in"], codes: Int8[Tensor, "out in"], scales: Float[Tensor, " out"]
) -> Float[Tensor, "n out"]:
    """`Backend.product_of_bytes` in plain torch."""
    return (F.linear(x, codes.to(x.dtype)) * scales).to(x.dtype)


def codes_unpacked_and_multiplied(x: Float[Tensor, "n in"], weight: PairCodes) -> Float[Tensor, "n out"]:
    """`Backend.product_of_codes` in plain torch."""
    numbers = math.prod(weight.shape)
    found = unpacked_pairs(weight.codes, weight.scales.each(), weight.levels, weight.block, numbers, x.dtype)
    return F.linear(x, found.view(weight.shape))


def unpacked_pairs(
    codes: UInt8[Tensor, " pairs"],
    scales: Float[Tensor, " blocks"],
    levels: Float[Tensor, 16],
    block: int,
    numbers: int,
    dtype: torch.dtype,
) -> Float[Tensor, " numbers"]:
    """`Backend.unpacked` in plain torch, in slices of whole blocks, so that no more than a slice is float32 at once."""
    found = torch.empty(numbers, dtype=dtype, device=codes.device)
    size = max(1, PIECE // (2 * block)) * 2 * block
    for start in range(0, numbers, size):
        own = codes[start // 2 : (start + size) // 2]
        places = torch.stack([own >> 4, own & 15], 1).view(-1)[: numbers - start]
        near = scales[start // block : -(-(start + len(places)) // block)].repeat_interleave(block)[: len(places)]
        found[start : start + len(places)] = levels[places.int()] * near
    return found


def attended_by_text(
    query: Float[Tensor, "n heads size"],
    keys: Float[Tensor, "rows groups size"],
    values: Float[Tensor, "rows groups size"],
    texts: Paged,
    scale: float,
    window: int | None,
) -> Float[Tensor, "n heads size"]:
    """`Backend.attend_pages` in plain torch: a call for each text, over a copy of its keys."""
    out = torch.empty_like(query)
    counts, starts = texts.counts.tolist(), texts.starts.tolist()
    within = torch.arange(texts.size, device=query.device)
    for index, count in enumerate(counts):
        own = slice(starts[index], starts[index + 1])
        new = own.stop - own.start
        used = texts.pages[index, : -(-count // texts.size)]
        rows = (used[:, None] * texts.size + within).flatten()[:count]
        q, k, v = (each.transpose(0, 1)[None] for each in (query[own], keys[rows], values[rows]))
        last = torch.arange(count - new, count, device=query.device)[:, None]
        places = torch.arange(count, device=query.device)[None]
        seen = (places <= last) if window is None else (places <= last) & (places > last - window)
        grouped = q.shape[1] != k.shape[1]
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=grouped)
        out[own] = found[0].transpose(0, 1)
    return out


def wide(tensor: Tensor) -> torch.dtype:
    """The precision in which numbers of this tensor are added up."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _places(runs: Sequence[Run]) -> list[tuple[slice, Run]]:
    """Where each run lies, and the run."""
    places, start = [], 0
    for count, length in runs:
        places.append((slice(start, start + count * length), (count, length)))
        start += count * length
    return places


def _texts(flat: Float[Tensor, "n heads size"], run: Run) -> Float[Tensor, "count heads length size"]:
    """Texts of equal length as a batch; a view."""
    return flat.unflatten(0, run).transpose(1, 2)
