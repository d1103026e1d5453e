"""Adapters merged by their factors, against the same on whole weights."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.core.errors import RecipeError
from luthier.merge.adapters import joined, share_lost
from luthier.merge.lora import Factors
from luthier.mergers import Part
from tests.mergers_of import merger

RANKS = (2, 3, 1)
IN, OUT = 20, 14


def factors(count: int = 3) -> list[Factors]:
    draws = np.random.default_rng(0)
    return [
        Factors(draws.standard_normal((rank, IN), np.float32), draws.standard_normal((OUT, rank), np.float32))
        for rank in RANKS[:count]
    ]


def whole(part: Factors) -> np.ndarray:
    return part.up @ part.down


WEIGHTS = (1.0, -0.5, 2.0)


def summed(parts: list[Factors]) -> np.ndarray:
    return sum((weight * whole(part) for weight, part in zip(WEIGHTS, parts, strict=True)), np.zeros((OUT, IN)))


def test_side_by_side_is_the_weighted_sum_exactly() -> None:
    """Breaks when a weight goes into both factors, or cross terms appear."""
    found = joined("x", factors(), WEIGHTS, None, None)
    assert len(found.factors.down) == sum(RANKS) and found.lost == 0
    np.testing.assert_allclose(whole(found.factors), summed(factors()), rtol=1e-5, atol=1e-5)
    assert found.whole == pytest.approx(float(np.square(summed(factors())).sum()), rel=1e-5)


@pytest.mark.parametrize("rank", [1, 4, 6, 9])
def test_a_rank_is_cut_as_by_the_svd_of_the_whole(rank: int) -> None:
    """Breaks when factors are cut one by one, or what is lost is told wrongly."""
    wanted = summed(factors())
    left, sizes, right = np.linalg.svd(wanted)
    best = left[:, :rank] * sizes[:rank] @ right[:rank]
    found = joined("x", factors(), WEIGHTS, None, rank)
    assert len(found.factors.down) == min(rank, sum(RANKS))
    np.testing.assert_allclose(whole(found.factors), best, rtol=1e-4, atol=1e-4)
    lost = float(np.linalg.norm(wanted - best) / np.linalg.norm(wanted))
    assert share_lost([found]) == pytest.approx(lost, abs=1e-5)


@pytest.mark.parametrize(("name", "count"), [("linear", 3), ("slerp", 2), ("karcher", 3), ("task_arithmetic", 3)])
def test_weighted_sums_are_what_they_would_be_on_whole_weights(name: str, count: int) -> None:
    """Breaks when lengths or angles of cores are not those of the changes."""
    parts = factors(count)
    weights = (1.0, 0.5, 2.0)[:count]
    found = joined("x", parts, weights, merger(name), sum(RANKS))
    base = np.zeros((OUT, IN), np.float32)
    wanted = merger(name).whole(Part(tuple(map(whole, parts)), base, weights, 0, base.size, 0))
    np.testing.assert_allclose(whole(found.factors), wanted, rtol=1e-4, atol=1e-4)


def test_ties_is_taken_in_the_shared_singular_basis() -> None:
    """Breaks when the basis is another than that of all changes side by side (KnOTS), found here from whole weights."""
    parts = factors(2)
    changes = [whole(part) for part in parts]
    left, sizes, right = np.linalg.svd(np.concatenate(changes, 1).astype(np.float64), full_matrices=False)
    rank = RANKS[0] + RANKS[1]
    aligned = [right[:rank, IN * n : IN * (n + 1)].astype(np.float32) for n in range(2)]
    method = merger("ties", density=0.5)
    base = np.zeros((rank, IN), np.float32)
    merged = method.whole(Part(tuple(aligned), base, (1.0, 1.0), 0, base.size, 0))
    # A singular vector has no sign of its own; an elected sign that is a tie does, and there is none here.
    wanted = (left[:, :rank] * sizes[:rank]).astype(np.float32) @ merged
    found = joined("x", parts, (1.0, 1.0), method, rank)
    np.testing.assert_allclose(whole(found.factors), wanted, rtol=1e-3, atol=1e-3)


def test_one_adapter_is_itself_and_other_shapes_are_told() -> None:
    """Breaks when an adapter alone is changed by being merged."""
    one = factors(1)
    for name in ("linear", "task_arithmetic", "ties", "karcher"):
        if merger(name).models[0] == 1:
            method = merger(name, density=1.0) if name == "ties" else merger(name)
            found = joined("x", one, (1.0,), method, None)
            np.testing.assert_allclose(whole(found.factors), whole(one[0]), rtol=1e-4, atol=1e-4)
    other = Factors(np.ones((1, 3), np.float32), np.ones((4, 1), np.float32))
    with pytest.raises(RecipeError, match="q_proj has the shapes"):
        joined("q_proj", [one[0], other], (1.0, 1.0), None, None)
