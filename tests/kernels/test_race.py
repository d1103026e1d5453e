"""The race: what is timed, on which inputs, and what is looked at afterwards; clocks and events are made up here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from luthier.kernels.race import CACHE_BYTES, CpuStopwatch, CudaStopwatch, Race
from tests.kernels.entrants import DOUBLES, LOOKS_FOR_THE_OTHER, WRITES

SEEDS = [3, 4]


class Clock:
    """Nanoseconds, a thousand at each look."""

    def __init__(self) -> None:
        self.looks = 0

    def __call__(self) -> int:
        self.looks += 1
        return 1000 * self.looks


@pytest.fixture(autouse=True)
def small_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CACHE_BYTES, "cpu", 64)


def race(program: str = DOUBLES, allowed: list[str] | None = None, clock: Any = None) -> Race:
    made = Race(CpuStopwatch(clock or Clock()), [[2, 3], 2])
    made.enter("f", program, allowed)
    return made


def test_each_repetition_is_timed_on_inputs_of_its_own() -> None:
    """Breaks when a repetition repeats inputs, or the second half of the values is that of another repetition."""
    made = race()
    made.draw(SEEDS)
    assert made.timed() == pytest.approx([1e-6, 1e-6])
    made.draw([5])
    assert made.timed() == pytest.approx([1e-6])
    kinds, sizes, values, untouched = zip(*made.values([0.0, 0.5, 0.999]), strict=True)
    assert set(kinds) == {"torch.float32"} and set(map(tuple, sizes)) == {(2, 3)} and set(untouched) == {True}
    for seed, found in zip([*SEEDS, 5], values, strict=True):
        drawn = torch.randn([2, 3], generator=torch.Generator().manual_seed(seed)).reshape(-1)
        assert found == [2 * float(drawn[at]) for at in (0, 3, 5)]


def test_an_input_that_was_written_into_is_seen() -> None:
    made = race(WRITES)
    made.draw(SEEDS)
    made.timed()
    assert [untouched for *_, untouched in made.values([0.0])] == [False, False]


def test_who_comes_second_does_not_find_who_was_first() -> None:
    """Breaks when the reference can be called by the answer, or its values are still there."""
    made = race()
    made.draw(SEEDS)
    made.timed()
    made.enter("f", LOOKS_FOR_THE_OTHER)
    assert made.values([0.0]) == []
    made.draw([7])
    with pytest.raises(AttributeError, match="secret"):
        made.timed()


def test_of_pytorch_only_what_is_allowed_runs() -> None:
    made = race(allowed=["empty_like"])
    made.draw(SEEDS)
    with pytest.raises(ValueError, match="PyTorch computes: "):
        made.timed()
    unsuitable = race("def f(x, y):\n    return [1.0]")
    unsuitable.draw(SEEDS)
    unsuitable.timed()
    with pytest.raises(TypeError, match="no tensor"):
        unsuitable.values([0.0])


def test_on_a_gpu_caches_are_emptied_before_and_all_streams_waited_for_after() -> None:
    """Breaks when the launch is timed instead of the work, an event is taken early, or a stream is not waited for."""
    told: list[str] = []
    events = iter(["first", "second"])
    watch = CudaStopwatch(
        lambda: next(events), lambda event: told.append(f"record {event}"),
        lambda *pair: 4.0 if pair == ("first", "second") else 0.0,
        lambda: told.append("wait"), lambda: told.append("empty"),
    )  # fmt: skip
    made, seconds = watch.timed(lambda: told.append("work") or "made")
    assert (made, seconds) == ("made", pytest.approx(4e-3))
    assert told == ["wait", "empty", "record first", "work", "record second", "wait"]
