"""Runs killed at random moments, a few: `make faults` kills a thousand."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults import kills, orphans, runs
from tests.faults.campaign import CLEAN

SEED = 1


class OneKill(random.Random):
    """Says: kill once, while the run trains; when that is, the log of the unbroken run tells."""

    def __init__(self, unbroken: runs.Unbroken) -> None:
        super().__init__()
        self.killed = False
        events = runs.events(unbroken.folder)
        began = events[-1]["time"] - unbroken.seconds
        self.steps = [event["time"] - began for event in events if event["kind"] == "step"]

    def uniform(self, a: float, b: float) -> float:
        """The first time some moment between two steps, then one that never comes."""
        delay = runs.LONGEST if self.killed else super().uniform(self.steps[0], self.steps[-1])
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
        once = OneKill(unbroken)
        trial = kills.killed_until_done(unbroken, faults / "trial", once, span=unbroken.seconds, prepare=broken)
        verdicts.append(trial.verdict)
    assert verdicts[-1] == "silent-different"


def test_nothing_outlives_a_killed_parent(faults: Path) -> None:
    """Breaks when a child is started that is not bound to its parent, or a run has no child there to look at."""
    orphans.each_child(seed=SEED, folder=faults).must_hold()


@pytest.mark.slow
def test_nothing_outlives_a_parent_killed_at_any_moment(faults: Path) -> None:
    """Breaks where the test above does, at moments that it leaves out."""
    orphans.run(2, seed=SEED, folder=faults).must_hold()


@pytest.mark.slow
def test_a_child_that_is_bound_to_nobody_is_noticed(faults: Path) -> None:
    """Breaks when children are not found any more."""
    assert orphans.control(seed=SEED, folder=faults).passed == 0


@pytest.mark.slow
def test_every_broken_variant_is_noticed(faults: Path) -> None:
    """Breaks when the campaign cannot fail."""
    assert kills.control(seed=SEED, folder=faults).passed == 0
