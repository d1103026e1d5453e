"""Random numbers by their number: the i-th draw is the same whoever asks for it, in whatever pieces and order.

Idea: a counter goes through a hash that mixes all its bits. So a mask over a tensor does not depend on how the tensor
is cut, how many threads there are, or what was drawn before.
Equation: splitmix64: z = key + (i + 1) 0x9E3779B97F4A7C15; z = (z ^ z >> 30) 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) 0x94D049BB133111EB; z ^ z >> 31; the draw is its upper 24 bits / 2^24.
Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014), and Vigna's constants.
Cost: about ten operations on 64-bit whole numbers a draw.
"""

from __future__ import annotations

import hashlib
from typing import Final

import torch
from jaxtyping import Float, Int
from torch import Tensor

_GOLDEN: Final = 0x9E3779B97F4A7C15
_MIXES: Final = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def key_of(*parts: object) -> int:
    """A key for draws that belong to `parts` (a seed, a name, a number) and to nothing else."""
    text = "\x00".join(map(str, parts)).encode()
    return _signed(int.from_bytes(hashlib.sha256(text).digest()[:8], "little"))


def uniform(key: int, first: int, count: int) -> Float[Tensor, " n"]:
    """Draws `first` to `first + count` of `key`, each at least 0 and below 1."""
    state = torch.arange(first + 1, first + count + 1, dtype=torch.int64).mul_(_signed(_GOLDEN)).add_(key)
    for bits, factor in _MIXES:
        state.bitwise_xor_(_shifted(state, bits)).mul_(_signed(factor))
    state.bitwise_xor_(_shifted(state, 31))
    return _shifted(state, 40).to(torch.float32).mul_(2.0**-24)


def _shifted(state: Int[Tensor, " n"], bits: int) -> Int[Tensor, " n"]:
    # torch shifts keep the sign: what they fill in on the left is taken off again.
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value
