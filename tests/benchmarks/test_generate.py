"""The benchmark of generation: its tables, what makes a line, and what the table says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.arithmetic.shapes import shape_of
from tests.benchmarks.lines import module


def job(workload: str = "m1-16", home: Path = Path(), **changes: Any) -> Any:
    given = {"home": home, "system": "luthier", "workload": workload, "precision": "bfloat16", "settings": {}}
    return module("generate_work").Job(**(given | changes))


def line(system: str, rate: float, *, contended: bool = False, **changes: Any) -> dict[str, Any]:
    own = {"workload": "m1-1", "system": system, "repetition": 0, "contended": contended, "tokens_per_second": rate}
    own |= {"later_tokens_per_second": rate + 1, "first_tokens_s": 0.5, "peak_memory_bytes": 10**9}
    return own | changes


def test_every_workload_names_systems_there_are_and_a_model() -> None:
    work, shapes = module("generate_work"), module("workloads").MODELS
    for name, one in work.WORKLOADS.items():
        assert set(one.systems) <= set(work.SYSTEMS) and one.systems[0] == work.OURS, name
        assert one.model in shapes and one.adapters <= work.ADAPTERS
        assert len(one.lengths()) == one.requests
        assert not one.shared or len(set(one.lengths())) == 1


def test_prompts_are_stretches_of_their_own_or_the_same(tmp_path: Path) -> None:
    """Breaks when two requests begin alike where nothing is shared: one of them would be found read."""
    (tmp_path / "m1").mkdir()
    rows = [json.dumps({"input_ids": list(range(i, i + 512))}) for i in range(0, 20 * 512, 512)]
    (tmp_path / "m1" / "rows.jsonl").write_text("\n".join(rows), "utf-8")
    work = module("generate_work")
    own = work.prompts_of(job(home=tmp_path))
    assert [len(prompt) for prompt in own] == [prompt for prompt, _ in job().work.lengths()]
    assert len({prompt[0] for prompt in own}) == len(own)
    shared = work.prompts_of(job("m1-shared", home=tmp_path))
    assert len(shared) == 16 and all(prompt == shared[0] and len(prompt) == 512 for prompt in shared)


def made(tokens: list[list[int]], first_s: float = 0.5) -> dict[str, Any]:
    work = module("generate_work")
    given: dict[str, Any] = {"clocks": {"wall_s": 2.5, "contended": False}, "probes": {}, "peak": {}, "machine": {}}
    found: dict[str, Any] = work.result_line(
        job("m1-16-uneven"), work.Answered(tokens, first_s), packages=(), settings={}, **given
    )
    return found


def test_a_line_counts_what_was_asked_for() -> None:
    """Breaks when a static batch is credited with what it says after an answer's end."""
    wanted = [answer for _, answer in job("m1-16-uneven").work.lengths()]
    found = made([[1] * count for count in wanted])
    assert found["said_tokens"] == sum(wanted) and found["tokens_per_second"] == round(sum(wanted) / 2.5, 2)
    assert found["later_tokens_per_second"] == round((sum(wanted) - 16) / 2, 2)
    assert made([[1] * 96 for _ in wanted])["said_tokens"] == sum(wanted)
    with pytest.raises(SystemExit, match=r"ended answers \[3\]"):
        made([[1] * (count - (index == 3)) for index, count in enumerate(wanted)])


def test_the_table_compares_with_the_first_peer_and_leaves_contended_lines_out() -> None:
    lines = [line("luthier", 90.0, contended=True), line("luthier", 60.0), line("transformers", 20.0)]
    rows = module("generate_report").table([*lines, line("luthier", 0.0, failure="it fell over")])
    assert rows[1][:5] == ["m1-1", "luthier", "1", "60.0", "3.00"]
    assert rows[2][:5] == ["m1-1", "transformers", "1", "20.0", "1.00"]
    alone = module("generate_report").table([line("luthier", 90.0, contended=True)])
    assert alone[1][:5] == ["m1-1", "luthier", "1 contended", "90.0", "1.00"]


def test_the_limit_is_what_products_and_reading_take(tmp_path: Path) -> None:
    """Breaks when a shared prompt counts for each answer, or a step of few rows is told by its products."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 100}
    config = {"model_type": "llama", "num_attention_heads": 4, "tie_word_embeddings": False, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    blocks, table = 2 * (4 * 64 * 64 + 3 * 64 * 128), 64 * 100
    reading = module("limits").generation_seconds
    shape = shape_of(config)
    fast = {"weights": 2 * (blocks + 2 * table), "flops_per_second": 1e30}
    # Two steps after the first tokens, of two texts and of one: weights, a row of the table looked up, and keys.
    found = reading(shape, [(10, 2), (10, 3)], shared=False, bytes_per_second=1.0, **fast)
    step = 2 * (blocks + table)
    cache = 2 * 2 * 2 * 64 * (2 * 11 + 12)
    assert found == pytest.approx(fast["weights"] + 2 * step + cache)
    slow = {"weights": 0.0, "flops_per_second": 1.0, "bytes_per_second": 1e30}
    apart = reading(shape, [(10, 1)] * 3, shared=False, **slow)
    assert apart == pytest.approx(3 * reading(shape, [(10, 1)] * 3, shared=True, **slow))
    probes = {"before": {"gemm_gflops": 1.0, "block_gflops": 2.0, "copy_gb_per_s": 1.0}}
    own = line("luthier", 90.0, workload="m1-1", precision="bfloat16", probes=probes, said_tokens=128)
    percent = module("generate").percent_of_limit
    seconds = reading(shape, [(128, 128)], shared=False, weights=fast["weights"] + 2 * shape.vectors,
                      flops_per_second=2e9, bytes_per_second=1e9)  # fmt: skip
    assert percent(own, tmp_path) == {"percent_of_limit": pytest.approx(100 * seconds * 90 / 128, abs=0.1)}
    assert percent(own | {"system": "luthier-int8"}, tmp_path) == {}


def test_unknown_names_are_told() -> None:
    with pytest.raises(SystemExit):
        module("generate").parse(["--workloads", "m9"])
    args = module("generate").parse(["--workloads", "m1-1,m2-1", "--systems", "luthier"])
    assert args.workloads == ["m1-1", "m2-1"] and args.systems == ["luthier"]


def test_a_page_tells_the_latest_run_that_has_a_peer_and_processes_enough(tmp_path: Path) -> None:
    report = module("generate_report")
    about = {"machine": {"cpu": "c", "cores": 2}, "precision": "bfloat16", "versions": {"torch": "2"}, "commit": "abc"}
    runs = [
        line(name, rate + own, run=f"2026-01-0{day}T00:00:00Z", repetition=own, **about)
        for day, rate, names in ((1, 40.0, ("luthier", "transformers")), (2, 80.0, ("luthier", "transformers")))
        for name in names for own in range(3 if day == 1 else 1)
    ]  # fmt: skip
    runs.append(line("luthier", 990.0, run="2026-01-03T00:00:00Z", **about))
    assert "| luthier | 80.0 | 1.00 |" in report.page(report.latest(runs, 1))
    several = report.page(report.latest(runs, 3))
    assert "| luthier | 41.0 (40.0-42.0) | 1.00 |" in several and "2026-01-01" in several
    assert report.page(report.latest(runs, 4)) == "No measurement has been made yet."
