"""Adam's two moments of a tensor, in float32 or in eight bits, and the direction they give.

Idea: running means of the gradient and of its square. In eight bits each is kept as codes of the dynamic map with one
scale for 256 numbers; they are made float32, moved and rounded again in slices, so that the wide copies stay small.
Equation: m = b1 m + (1-b1) g, v = b2 v + (1-b2) g^2; direction m / (sqrt(v) + eps). Correction for the zeros that both
    begin with is the caller's: sqrt(1 - b2^t) / (1 - b1^t).
Source: Kingma and Ba, arXiv 1412.6980, algorithm 1; eight bits: Dettmers et al., arXiv 2110.02861, section 2. Beyond
    it, a second moment that is not zero is never rounded to zero: its number would be divided by eps alone.
Cost: 8 bytes a number, or 2 + 8/256.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor

from luthier.maths.codebooks import dynamic_levels, packed, table, unpacked

BLOCK: Final = 256
"""Numbers that share a scale."""
SMALL: Final = 4096
"""Tensors with fewer numbers stay in float32: norms and biases, of which there is little to save and much to lose."""
_SLICE: Final = 2**20
"""Numbers that are float32 at once; whole blocks."""


def state_bytes(numbers: int, *, eight_bit: bool) -> int:
    """Bytes of both moments of a tensor."""
    if eight_bit and numbers >= SMALL:
        return 2 * numbers + 2 * 4 * math.ceil(numbers / BLOCK)
    return 8 * numbers


def direction(
    state: MutableMapping[str, Any],
    gradient: Float[Tensor, "*shape"],
    *,
    beta1: float,
    beta2: float,
    epsilon: float,
    eight_bit: bool,
) -> Float[Tensor, "*shape"]:
    """Move the moments that `state` holds (they begin as zeros) and give the direction, not corrected."""
    if not (eight_bit and gradient.numel() >= SMALL):
        if "first" not in state:
            state["first"], state["second"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        state["first"].lerp_(gradient, 1 - beta1)
        state["second"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        return state["first"] / state["second"].sqrt().add_(epsilon)
    flat = gradient.reshape(-1)
    if "first" not in state:
        _begin(state, flat)
    found = torch.empty_like(flat)
    signed, unsigned = (table(dynamic_levels(signed=signed), flat.device) for signed in (True, False))
    for start in range(0, len(flat), _SLICE):
        own = slice(start, min(start + _SLICE, len(flat)))
        blocks = slice(start // BLOCK, math.ceil(own.stop / BLOCK))
        first = unpacked(state["first"][own], state["first_scale"][blocks], signed, BLOCK)
        second = unpacked(state["second"][own], state["second_scale"][blocks], unsigned, BLOCK)
        first.lerp_(flat[own], 1 - beta1)
        second.mul_(beta2).addcmul_(flat[own], flat[own], value=1 - beta2)
        found[own] = first / second.sqrt().add_(epsilon)
        state["first"][own], state["first_scale"][blocks] = packed(first, signed, BLOCK)
        codes, state["second_scale"][blocks] = packed(second, unsigned, BLOCK)
        state["second"][own] = torch.where((codes == 0) & (second > 0), codes + 1, codes)
    return found.view_as(gradient)


def correction(step: int, *, beta1: float, beta2: float) -> float:
    """What a direction is multiplied by after `step` steps, because both moments began with zeros."""
    return float(math.sqrt(1 - beta2**step) / (1 - beta1**step))


def _begin(state: MutableMapping[str, Any], flat: Float[Tensor, " n"]) -> None:
    zero = dynamic_levels(signed=True).index(0.0)
    blocks = math.ceil(len(flat) / BLOCK)
    state["first"] = torch.full_like(flat, zero, dtype=torch.uint8)
    state["second"] = torch.zeros_like(flat, dtype=torch.uint8)
    for name in ("first_scale", "second_scale"):
        state[name] = torch.zeros(blocks, device=flat.device)
