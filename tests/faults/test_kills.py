"""Runs killed at random moments, a few: `make faults` kills a thousand."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults import kills, orphans, runs
from tests.faults.campaign import CLEAN

SEED = 1


class OneKill(random.Random):
    """Says: kill once, while the run trains."""

    killed = False

    def uniform(self, a: float, b: float) -> float:
        """The first time some moment in the last third, then one that never comes."""
        delay = runs.LONGEST if self.killed else b * (0.65 + 0.25 * self.random())
        self.killed = True
        return delay


def test_killed_runs_finish_with_the_same_bits(faults: Path) -> None:
    """Breaks when a state is saved incompletely, a log keeps what is repeated, or the same command does not go on."""
    kills.run(5, seed=SEED, folder=faults).must_hold()


def test_a_log_that_is_never_cut_back_is_noticed(faults: Path) -> None:
    """Breaks when the comparison with the unbroken run looks at too little."""
    shop = runs.workshop(faults)
    combination = runs.Combination("lora", "sft", "adamw", "cosine")
    # With few checkpoints, so that most kills come after a step that none of them holds.
    unbroken = runs.unbroken(shop, combination, interval=4)
    broken = (runs.NO_FRESH_PROOF, "tests.faults.broken:log_never_cut_back")
    verdicts: list[str] = []
    while len(verdicts) < 20 and set(verdicts) <= {CLEAN}:
        trial = kills.killed_until_done(unbroken, faults / "trial", OneKill(), span=unbroken.seconds, prepare=broken)
        verdicts.append(trial.verdict)
    assert verdicts[-1] == "silent-different"


def test_nothing_outlives_a_killed_parent(faults: Path) -> None:
    """Breaks when a child is started that is not bound to its parent."""
    orphans.run(2, seed=SEED, folder=faults).must_hold()


@pytest.mark.slow
def test_a_child_that_is_bound_to_nobody_is_noticed(faults: Path) -> None:
    """Breaks when children are not found any more."""
    assert orphans.control(seed=SEED, folder=faults).passed == 0


@pytest.mark.slow
def test_every_broken_variant_is_noticed(faults: Path) -> None:
    """Breaks when the campaign cannot fail."""
    assert kills.control(seed=SEED, folder=faults).passed == 0
