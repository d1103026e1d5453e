"""Memory told from counts: factors against sums that are known, moments against sums made by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from luthier.arithmetic.counted import Load, Rates, Texts, counted_peak
from luthier.arithmetic.memory import Decoder, Output, Work

DECODER = Decoder(
    layers=2, hidden=10, inner=30, query=10, key_value=10, heads=2, vocabulary=100, gated=False, bytes=4
)  # fmt: skip
WORK = Work(tokens=50, predicted=5, longest=9, output=Output(in_place=True))


def load(seed: int) -> Load:
    draw = np.random.default_rng(seed)
    runs, said = ([(int(c), int(n), int(n)) for c, n in draw.integers(1, 9, (4, 2))] for _ in range(2))
    return Load(texts=Texts.of(runs), answers=Texts.of(said), read=seed, crossed=3 * seed, predicted=2)


def of_tokens(*factors: float) -> Rates:
    """Rates of stages that keep so much of a token of a text and nothing else."""
    made = np.zeros((len(factors), len(load(0).numbers)))
    made[:, 2] = factors
    return Rates(made)


def test_factors_come_out_as_they_went_in() -> None:
    """Breaks when a number of a load takes the place of another, or a stage that of another."""
    truth = np.random.default_rng(1).integers(1, 50, (3, len(load(0).numbers))).astype(np.float64)
    loads = [load(seed) for seed in range(40)]
    counts = [[round(each) for each in truth @ np.array(one.numbers)] for one in loads]
    rates, other = Rates.of(loads, counts), load(99)
    assert rates.kept(other) == [round(each) for each in truth @ np.array(other.numbers)]
    assert rates.of_pairs(1) == pytest.approx(truth[1, 3])


def test_the_widest_moment_is_the_head_or_the_last_block() -> None:
    """Breaks when what lies above a block is still counted at its turn, or the head works beside nothing."""
    one, rates = Load(texts=Texts.of([(5, 10, 10)])), of_tokens(0, 100, 2, 300, 7)
    feed = 50 * (2 * 30 + 2 * 10) * 4
    assert counted_peak(DECODER, WORK, rates, one, readers=0).total == 50 * 402 + feed
    gated = replace(DECODER, gated=True)
    edited = counted_peak(gated, WORK, rates, one, readers=0, edits_inner=True)
    assert edited.total == 50 * 402 + feed + 50 * 2 * 30 * 4
    broad = replace(DECODER, vocabulary=100_000)
    assert counted_peak(broad, WORK, rates, one, readers=0).total == 50 * 409 + 5 * 10 * 4 + 5 * 100_000 * 4
    # Where no block is known, all of it is one.
    assert counted_peak(DECODER, WORK, of_tokens(100), one, readers=0).total == 50 * 100 + feed


def test_a_block_that_keeps_nothing_is_at_work_forward() -> None:
    """Breaks when a model of which only the head is trained is planned as if its blocks took nothing."""
    one, rates = Load(texts=Texts.of([(5, 10, 10)])), of_tokens(0, 0, 0)
    plain = counted_peak(DECODER, WORK, rates, one, readers=0)
    assert plain.total == 50 * (2 * 30 + 4 * 10) * 4
    assert counted_peak(DECODER, WORK, rates, one, readers=0, drops=True).total == plain.total + 50 * 30 * 4
    # What is kept already has in it what works forward.
    kept = of_tokens(0, 100, 0)
    found = [counted_peak(DECODER, WORK, kept, one, readers=0, drops=drops) for drops in (False, True)]
    assert found[0] == found[1]


def test_an_encoders_states_have_a_gradient_while_the_decoder_goes_backward() -> None:
    """Breaks when a decoder's blocks are taken to see the encoder's tokens, or nothing waits for the encoder."""
    one = Load(texts=Texts.of([(5, 10, 10)]), answers=Texts.of([(5, 4, 4)]))
    below = counted_peak(DECODER, WORK, of_tokens(0, 0, 0, 900, 0), one, readers=1)
    assert below.total == 50 * 900 + 20 * (2 * 30 + 2 * 10) * 4 + 50 * 10 * 4
    above = counted_peak(DECODER, WORK, of_tokens(0, 900, 0, 0, 0), one, readers=1)
    assert above.total == 50 * 900 + 50 * (2 * 30 + 2 * 10) * 4


def test_gradients_of_pairs_are_those_of_one_call() -> None:
    """Breaks when attention that keeps its scores goes backward for free, or for all texts at once."""
    one, made = Load(texts=Texts.of([(1, 100, 100), (1, 200, 200)])), of_tokens(0, 0, 0).factors.copy()
    made[1, 3] = 24
    own = counted_peak(DECODER, WORK, Rates(made), one, readers=0)
    # By then the inside of the feed-forward is gone.
    gone = 300 * 30 * 4
    assert own.total == 24 * (100**2 + 200**2) - gone + 300 * 50 * 4 + 24 * 200**2
