"""The benchmark runner without any peer: order, gates, contention, summaries, the report."""

from __future__ import annotations

import importlib
import json
import sys
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
REFERENCE = {"loss": 10.5, "grad_norm": 2.0}

FAKE_WORKER = """
import json, sys
system = sys.argv[sys.argv.index("--system") + 1]
if system == "broken":
    sys.exit("it does not work")
line = json.loads(LINE) | {"system": system}
print("noise before the line")
print(json.dumps({"loss": 10.5, "grad_norm": 2.0} if system == "reference" else line))
"""


@pytest.fixture(autouse=True)
def flat_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks are scripts that import their neighbours by plain name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


def line_of(system: str = "luthier", *, rate: float = 100.0, memory: int = 10**9, **changes: Any) -> dict[str, Any]:
    line = {
        "run": "r1", "system": system, "repetition": 0, "commit": "abc", "data_digest": "d" * 64, "seed": 0,
        "workload": "sft", "valid": True, "contended": False, "tokens_per_second": rate, "peak_memory_bytes": memory,
        "tokens": {"real": 1000, "supervised": 400, "padded": 2000, "pairs": 100_000, "padding_share": 0.5},
        "percent_of_limit": 61.2,
        "steps": {"all": 3, "warm": 1, "rows": 16, "max_tokens": 512}, "settings": {"threads": 2},
        "versions": {"torch": "2", "python": "3"}, "loss": {"first": 10.5, "last": 10.4}, "grad_norm_first": 2.0,
        "machine": {"cpu": "c", "cores": 2, "memory_bytes": 2**34, "python": "3"},
        "parameters": {"tensors": 4, "changed": 4},
        "probes": {"before": {"gemm_gflops": 400.0}, "after": {"gemm_gflops": 390.0}},
    }  # fmt: skip
    return line | changes


def job(**changes: Any) -> Any:
    values = {"folder": Path(), "system": "s", "steps": 4, "warm": 1, "batch": 4, "seed": 0, "settings": {}}
    return module("worker").Job(**(values | {"grouped": False} | changes))


def test_order_interleaves() -> None:
    assert module("sft").order(["a", "b"], 2) == [(0, "a"), (0, "b"), (1, "a"), (1, "b")]


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


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({}, None),
        ({"loss": {"first": 10.506}}, "first_loss"),
        ({"loss": {"first": float("nan")}}, "first_loss"),
        ({"grad_norm_first": 2.05}, "first_grad_norm"),
        ({"parameters": {"tensors": 4, "changed": 3}}, "all_parameters_changed"),
        ({"parameters": {"tensors": 0, "changed": 0}}, "all_parameters_changed"),
    ],
)
def test_gates(changes: dict[str, Any], failed: str | None) -> None:
    passed = module("results").checks(line_of(**changes), REFERENCE)
    assert [name for name, good in passed.items() if not good] == ([failed] if failed else [])


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


def test_clock_times_the_steps_after_the_warm_ones() -> None:
    clock = module("worker").StepClock(job(steps=3, warm=2))
    for _ in range(2):
        clock.step_ended()
    with pytest.raises(SystemExit, match="2 steps were made, 3 were asked for"):
        clock.figures()
    clock.step_ended()
    assert clock.figures()["wall_s"] == round(clock.step_walls[2] - clock.step_walls[1], 3)


def test_summary_leaves_out_invalid_and_contended_lines() -> None:
    results = module("results")
    lines = [
        line_of(rate=100), line_of(rate=300), line_of(rate=120),
        line_of(rate=9999, valid=False), line_of(rate=1, contended=True), line_of(rate=2, contended=None),
        line_of("trl-stock", rate=40, memory=4 * 10**9, contended=True),
    ]  # fmt: skip
    ours, stock = results.summarise(lines)
    assert (ours.rate.median, ours.rate.low, ours.rate.high) == (120, 100, 300)
    assert (ours.used, ours.invalid, ours.contended, ours.contended_only) == (3, 1, 2, False)
    assert stock.contended_only and stock.used == 1
    text = results.markdown(lines, baseline="trl-stock")
    assert "| luthier | 120 (100-300) | 1.00 (1.00-1.00) | 3.00 | 0.25 | 61 | 50% | 3 |" in text
    assert "CONTENDED RUNS ONLY, not evidence" in text


def test_runs_are_not_mixed() -> None:
    results = module("results")
    assert results.latest_run([line_of(run="r1"), line_of(run="r2")]) == [line_of(run="r2")]
    other = line_of(run="r3", workload="full")
    assert results.latest_run([line_of(run="r2"), other], "sft") == [line_of(run="r2")]
    assert results.workloads([other, line_of()]) == ["full", "sft"]
    assert "No measurement" in results.markdown([], baseline="trl-stock")


def test_report_replaces_only_its_own_part() -> None:
    report = module("report")
    begin, end = "<!-- benchmarks/sft.py: lora begin -->", "<!-- benchmarks/sft.py: lora end -->"
    once = report.place("# Title\n\nwords\n", "first", "lora")
    twice = report.place(once + "after\n", "second", "lora")
    assert twice == f"# Title\n\nwords\n\n{begin}\nsecond\n{end}\nafter\n"
    both = report.place(twice, "other", "full")
    assert both.startswith(twice) and "full begin" in both
    with pytest.raises(SystemExit, match="only one of"):
        report.place(begin, "text", "lora")


def test_runner_writes_a_line_a_process_and_reports_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sft = module("sft")
    fake = tmp_path / "fake.py"
    fake.write_text(FAKE_WORKER.replace("LINE", repr(json.dumps(line_of()))), "utf-8")
    systems = {name: sft.System(str(fake)) for name in ("one", "two", "broken")}
    monkeypatch.setattr(sft, "SYSTEMS", systems)
    monkeypatch.setattr(sft, "REFERENCE", sft.System(str(fake)))
    (tmp_path / "sft").mkdir()
    args = sft.parse(["--home", str(tmp_path), "--systems", "one,broken,two", "--repetitions", "2"])
    lines, failed = sft.measure(args, "digest")
    assert failed and [line["system"] for line in lines] == ["one", "two", "one", "two"]
    assert all(line["valid"] and line["process_wall_s"] >= 0 for line in lines)
    assert module("results").read_lines(tmp_path / "results.jsonl") == lines
    assert "it does not work" in capsys.readouterr().err


@pytest.mark.parametrize("bad", [["--systems", "trl-stok"], ["--warm", "0"], ["--systems", "trl-stock"]])
def test_bad_arguments_are_refused(bad: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        module("sft").parse(["--home", str(tmp_path), *bad])


def test_percent_of_limit_is_worked_out_from_shapes_and_probes() -> None:
    """Breaks when padding counts as work, or the rate of another precision is taken."""
    sft = module("sft")
    args = sft.parse(["--home", "x", "--systems", "luthier"])
    one = sft.percent_of_limit(line_of(rate=1000.0), args)
    # 4 x 23.6 million for the blocks, 4 x 16.4 million for two fifths of the tokens, the adapter, attention over 100.
    flops = 4 * 23.592960e6 + 0.4 * 4 * 16.384e6 + 6 * 1.196032e6 + 3.5 * 4 * 100 * 512 * 8
    assert one == pytest.approx(100 * 1000 * flops / 395e9, abs=0.06)
    args.method = "full"
    assert sft.percent_of_limit(line_of(rate=1000.0), args) > 1.3 * one


def test_pins_are_exact() -> None:
    pins = (BENCHMARKS / "peers-trl.txt").read_text("utf-8").split()
    assert all(pin.count("==") == 1 for pin in pins)
    assert pins[0].startswith("torch==") and sys.version_info >= (3, 11)
