"""Rollouts of an engine somewhere else: it samples while steps are taken, and nothing comes out otherwise for it."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from luthier.core.errors import LuthierError, StoppedError, StorageError
from luthier.data.forest import Tree
from luthier.train.pass_report import PassReport
from luthier.train.state import LoopState, load_state
from tests.train.elsewhere import Elsewhere, PinnedTwin
from tests.train.test_rollouts import METHODS, Life

WAIT = 60.0
"""Seconds after which a test gives up; nobody waits so long where all is well."""
each_method = pytest.mark.parametrize("name", ["grpo, once", "grpo, twice in halves", "ppo"])


def beside(name: str, folder: Path | None = None, *, at: int = 0) -> tuple[Life, Elsewhere]:
    """A life whose rollouts are sampled elsewhere, one ahead."""
    life = Life(METHODS[name], folder, at=at, lag=1)
    speaker = Elsewhere(life.stepper, METHODS[name])
    life.source.speaker = speaker
    return life, speaker


def passes(life: Life, around: Callable[[int], None]) -> None:
    """Have something done in the middle of each step."""
    whole, count = life.stepper.forward_backward, iter(range(1, 99))

    def forward_backward(trees: list[Tree]) -> PassReport:
        found = whole(trees)
        around(next(count))
        return found

    life.stepper.forward_backward = forward_backward  # type: ignore[method-assign, assignment]


@each_method
def test_the_next_rollout_is_sampled_while_steps_are_taken(name: str) -> None:
    """Breaks when sampling and training take turns: then either would wait here for the other, for ever. Breaks too
    when what comes of it is not what taking turns comes to."""
    turns = Life(METHODS[name], None, lag=1)
    expected = turns.go(LoopState(total_steps=6))
    life, speaker = beside(name)
    replay = {"grpo, once": 1, "grpo, twice in halves": 4, "ppo": 3}[name]
    begun, trained, met = threading.Semaphore(0), threading.Semaphore(0), []

    def before(pinned: PinnedTwin) -> None:
        """A rollout does not go on before a step has been half-way through."""
        if pinned is not speaker.pins[0] and not pinned.asked:
            begun.release()
            met.append(trained.acquire(timeout=WAIT))

    def around(step: int) -> None:
        """And that step does not end before the rollout has begun."""
        if (step - 1) % replay == 0 and step + replay <= 6:
            assert begun.acquire(timeout=WAIT), "nobody samples while this step is taken"
            trained.release()

    speaker.before = before
    passes(life, around)
    assert life.go(LoopState(total_steps=6)) == expected
    assert len(met) == len(speaker.pins) - 1 and all(met)
    # A rollout is told when it is there; taking turns it is there before the steps that it is ahead of.
    assert rolled(life) == rolled(turns)
    assert {pinned.thread for pinned in speaker.pins} == {"luthier-rollout"}


def rolled(life: Life) -> list[str]:
    """What was told of rollouts, but for the leash, which is that of the time when it is told."""
    return [re.sub(r"\('leash', [^)]*\), ", "", values) for _, kind, values in life.logged if kind == "rollout"]


@each_method
@pytest.mark.parametrize("at", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_while_it_samples_it_goes_on_to_the_bit(name: str, at: int, tmp_path: Path) -> None:
    """Breaks when a rollout that is under way is forgotten, is sampled by weights that have changed since, or begins at
    other prompts."""
    whole, _ = beside(name, tmp_path / "state", at=at)
    expected = whole.go(LoopState(total_steps=6))
    torch.manual_seed(99)
    life, speaker = beside(name)
    state, life.row_excess = load_state(tmp_path / "state", life.stepper, life.source)
    assert state.step == at and not speaker.pins
    assert life.go(state) == expected
    assert life.logged == [event for event in whole.logged if (event[0] or 0) > at]


def test_what_fails_beside_is_raised_where_it_is_needed_and_can_be_gone_on_with(tmp_path: Path) -> None:
    """Breaks when an engine that dies ends a step that does not need it, or its rollout is lost with it."""
    expected = beside("grpo, twice in halves")[0].go(LoopState(total_steps=9))
    life, speaker = beside("grpo, twice in halves", tmp_path / "state", at=4)
    failed = threading.Event()

    def before(pinned: PinnedTwin) -> None:
        if pinned is not speaker.pins[0]:
            failed.set()
            raise StorageError("the engine is gone")

    speaker.before = before
    passes(life, lambda step: None if step > 1 else _is(failed.wait(WAIT)))
    with pytest.raises(StorageError, match="the engine is gone"):
        life.go(LoopState(total_steps=9))
    assert len(life.logged) == 5, "four steps were taken, and a rollout told"
    torch.manual_seed(99)
    again, _ = beside("grpo, twice in halves")
    state, again.row_excess = load_state(tmp_path / "state", again.stepper, again.source)
    assert again.go(state) == expected


def test_weights_that_were_lost_are_given_again_as_they_were() -> None:
    """Breaks when an engine that was started anew goes on with the weights of now, or is asked for ever."""
    expected = beside("grpo, once")[0].go(LoopState(total_steps=4))
    life, speaker = beside("grpo, once")
    lost: list[PinnedTwin] = []

    def before(pinned: PinnedTwin) -> None:
        if len(speaker.pins) == 3 and not lost:
            lost.append(pinned)
            pinned.lost = True
            raise StorageError("it was started anew")

    speaker.before = before
    assert life.go(LoopState(total_steps=4)) == expected
    assert [pinned.weights is speaker.pins[2].weights for pinned in speaker.pins].count(True) == 2

    def never(pinned: PinnedTwin) -> None:
        pinned.lost = True
        raise StorageError("again and again")

    life, speaker = beside("grpo, once")
    speaker.before = never
    with pytest.raises(StorageError, match="again and again"):
        life.source.next_step()
    assert len(speaker.pins) == 3


def test_a_signal_ends_the_waiting_and_what_is_under_way(tmp_path: Path) -> None:
    """Breaks when Ctrl-C has to wait for an engine that does not answer."""
    life, speaker = beside("grpo, once", tmp_path / "state", at=1)
    asked: list[LuthierError] = []
    told: list[str] = []
    speaker.waits.after = 0.0
    life.source.bind(lambda event: told.append(event.kind), lambda: asked[0] if asked else None)

    def before(pinned: PinnedTwin) -> None:
        if pinned is not speaker.pins[0]:
            asked.append(StoppedError("stopped by SIGTERM", do="luthier resume"))
            speaker.waits.sleep(WAIT)

    speaker.before = before
    with pytest.raises(StoppedError, match="SIGTERM"):
        life.go(LoopState(total_steps=4))
    life.source.close()
    assert speaker.closed and (tmp_path / "state").exists()
    assert not [each for each in threading.enumerate() if each.name == "luthier-rollout"]


def test_the_last_rollout_is_not_followed_by_one_that_nobody_needs() -> None:
    life, speaker = beside("grpo, twice in halves")
    life.go(LoopState(total_steps=8))
    assert len({pinned.thread for pinned in speaker.pins}) == 1 and len(speaker.pins) == 2
    again = Life(METHODS["grpo, twice in halves"], None, lag=1)
    again.go(LoopState(total_steps=8))
    assert again.source.roller.plan.lag and not again.source._ahead


def _is(met: bool) -> None:
    assert met
