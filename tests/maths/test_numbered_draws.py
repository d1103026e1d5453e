"""Draws by number: splitmix64 in plain Python, pieces as whole, and a distribution that is even."""

from __future__ import annotations

import hashlib
import struct

import numpy as np

from luthier.maths.numbered_draws import key_of, uniform

MASK = (1 << 64) - 1


def plain(key: int, number: int) -> float:
    z = (key + (number + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & MASK
    return ((z ^ z >> 31) >> 40) / 2**24


def test_they_are_splitmix64_whatever_the_piece() -> None:
    """Breaks when a shift keeps the sign, or the count starts anew with each piece."""
    for key in (0, key_of("a", 1), key_of("b", 2)):
        assert uniform(key, 5, 40).tolist() == [plain(key, number) for number in range(5, 45)]
    assert np.array_equal(uniform(3, 0, 100)[60:], uniform(3, 60, 40))


def test_they_are_even_and_keys_differ() -> None:
    """Breaks when the upper bits are not mixed."""
    draws = uniform(key_of(0, 0, 0), 0, 200_000)
    assert float(draws.min()) >= 0 and float(draws.max()) < 1
    counts, _ = np.histogram(draws, 20, (0, 1))
    assert np.abs(counts - 10_000).max() < 500
    other = uniform(key_of(0, 0, 1), 0, 200_000)
    assert abs(np.corrcoef(draws, other)[0, 1]) < 0.01
    assert key_of("ab", "c") != key_of("a", "bc")


def test_a_key_is_what_it_was() -> None:
    """Breaks when the same seed drops other numbers than it did: a key goes into that of a model with its sign."""
    for number in range(4):
        wanted = struct.unpack("<q", hashlib.sha256(f"seed\x00{number}".encode()).digest()[:8])
        assert (key_of("seed", number),) == wanted
