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

import numpy as np
from jaxtyping import Float

_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
_MIXES: Final = ((30, np.uint64(0xBF58476D1CE4E5B9)), (27, np.uint64(0x94D049BB133111EB)))
_BITS: Final = 64


def key_of(*parts: object) -> int:
    """A key for draws that belong to `parts` (a seed, a name, a number) and to nothing else."""
    text = "\x00".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little", signed=True)


def uniform(key: int, first: int, count: int) -> Float[np.ndarray, " n"]:
    """Draws `first` to `first + count` of `key`, each at least 0 and below 1."""
    # Whole numbers without a sign wrap around, as the equation wants it.
    state = np.arange(first + 1, first + count + 1, dtype=np.uint64)
    shifted = np.empty_like(state)
    state *= _GOLDEN
    state += np.uint64(key % (1 << _BITS))
    for bits, factor in _MIXES:
        state ^= np.right_shift(state, bits, out=shifted)
        state *= factor
    state ^= np.right_shift(state, 31, out=shifted)
    state >>= 40
    draws = state.astype(np.float32)
    draws *= 2.0**-24
    return draws
