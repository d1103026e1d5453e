"""What the training processes share: rows, clocks, what a peer was seen to train on; and what the machine says."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest

from tests.benchmarks.lines import job, module


def test_plan_gives_all_systems_the_same_rows() -> None:
    lengths = [(37 * row) % 101 + 1 for row in range(20)]
    plain = module("worker").plan(lengths, job())
    grouped = module("worker").plan(lengths, job(grouped=True))
    assert plain == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert grouped[0] == plain[0]
    assert sorted(chain.from_iterable(grouped[1:])) == sorted(chain.from_iterable(plain[1:]))

    def padded(batches: list[list[int]]) -> int:
        return sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)

    assert padded(grouped) < padded(plain)
    with pytest.raises(SystemExit, match="16 rows, 8 are prepared"):
        module("worker").plan(lengths[:8], job())


def seen(**changes: Any) -> Any:
    """What a peer computed in a step of the rows (1 2 3) and (4 5), each with a prompt of one token, to the left."""
    lists = {"ids": [[1, 2, 3], [0, 4, 5]], "mask": [[1, 1, 1], [0, 1, 1]], "labels": [[-100, 2, 3], [-100, -100, 5]]}
    return module("worker").Batch(**(lists | changes))


def test_count_compares_every_id_and_label(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = module("worker")
    rows = [worker.Row((1, 2, 3), 1), worker.Row((4, 5), 1)]
    monkeypatch.setattr(worker, "plan", lambda lengths, job: [[0, 1]])
    assert worker.count(job(), rows, [seen()]) == [worker.Counted(real=5, supervised=3, padded=6, pairs=9)]
    for wrong in (
        {"ids": [[1, 2, 9], [0, 4, 5]]},
        {"mask": [[1, 1, 1], [1, 1, 1]]},
        {"labels": [[1, 2, 3], [-100, -100, 5]]},
        {"labels": [[-100, 2, 5], [-100, -100, 3]]},
    ):
        with pytest.raises(SystemExit, match="other tokens or labels"):
            worker.count(job(), rows, [seen(**wrong)])
    with pytest.raises(SystemExit, match="labels on padding"):
        worker.count(job(), rows, [seen(labels=[[-100, 2, 3], [0, -100, 5]])])


def test_clock_times_the_steps_after_the_warm_ones() -> None:
    settled: list[int] = []
    clock = module("worker").StepClock(job(steps=3, warm=2), lambda: settled.append(1))
    for _ in range(2):
        clock.step_ended()
    with pytest.raises(SystemExit, match="2 steps were made, 3 were asked for"):
        clock.figures()
    clock.step_ended()
    assert clock.figures()["wall_s"] == round(clock.step_walls[2] - clock.step_walls[1], 3) and len(settled) == 3


def test_foreign_seconds_mark_a_run_contended() -> None:
    procfs = module("procfs")
    first = procfs.Moment(wall=0.0, own_cpu=1.0, all_cpu=100.0, steal=0.0)
    quiet = procfs.between(first, procfs.Moment(wall=10.0, own_cpu=19.0, all_cpu=118.9, steal=0.0))
    busy = procfs.between(first, procfs.Moment(wall=10.0, own_cpu=19.0, all_cpu=119.5, steal=0.0))
    robbed = procfs.between(first, procfs.Moment(wall=10.0, own_cpu=19.0, all_cpu=118.0, steal=1.5))
    unknown = procfs.between(first, procfs.Moment(wall=10.0, own_cpu=19.0, all_cpu=None, steal=None))
    assert (quiet["contended"], busy["contended"], robbed["contended"]) == (False, True, True)
    assert quiet["foreign_cpu_s"] == pytest.approx(0.9) and unknown["contended"] is None


def test_stat_line_is_read() -> None:
    procfs = module("procfs")
    ticks = procfs.os.sysconf("SC_CLK_TCK")
    busy, steal = procfs.parse_stat("cpu  100 200 300 9999 50 10 20 70 5 5\ncpu0 1\n")
    assert busy == pytest.approx(630 / ticks) and steal == pytest.approx(70 / ticks)
    assert procfs.parse_stat("") == (None, None)


def test_probes_measure_both_shapes_and_a_copy() -> None:
    device = module("devices").Device("cpu")
    found = module("probes").probe("float32", device, widest=(64, 128), seconds=0.001)
    assert set(found) == {"gemm_gflops", "block_gflops", "copy_gb_per_s"} and min(found.values()) > 0
    assert device.peak()["peak_memory_bytes"] is None or device.peak()["peak_memory_bytes"] > 10**7
