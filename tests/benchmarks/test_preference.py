"""The benchmark of preferences and rewards: its rows, our trees of them, and what makes a figure void."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.benchmarks.lines import module


def job(home: Path, **changes: Any) -> Any:
    given = {"home": home, "workload": "dpo", "system": "luthier", "model": "m1", "rows": 3, "steps": 4, "warm": 1}
    return module("preference_work").Job(**(given | changes))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "m1").mkdir()
    rows = [json.dumps({"input_ids": list(range(i, i + 400))}) for i in range(0, 8000, 400)]
    (tmp_path / "m1" / "rows.jsonl").write_text("\n".join(rows), "utf-8")
    return tmp_path


def test_every_system_gets_the_same_rows(home: Path) -> None:
    """Breaks when a peer learns from other rows, or an answer is longer than it is said to be."""
    work = module("preference_work")
    found = work.pairs(job(home))
    assert found == work.pairs(job(home, system="trl")) and len(found) == 12
    assert {len(pair.prompt) for pair in found} == {work.PROMPT}
    answers = [answer for pair in found for answer in (pair.chosen, pair.rejected)]
    assert all(work.SHORTEST <= len(answer) <= work.LONGEST for answer in answers)
    assert any(len(pair.chosen) != len(pair.rejected) for pair in found)
    assert found[0].tokens == len(found[0].prompt) + len(found[0].chosen) + len(found[0].rejected)
    asked = work.prompts(job(home))
    assert asked == work.prompts(job(home, system="trl")) and {len(ids) for ids in asked} == {work.ASKED}
    assert work.vowels("aeb") == 0.5


def test_a_pair_weighs_one(home: Path) -> None:
    """Breaks when long answers weigh more, or a prompt is learned from."""
    pair = module("preference_work").pairs(job(home))[0]
    tree = module("dpo_luthier").tree_of(pair, 5)
    assert tree.weight == pytest.approx(1) and tree.row == 5 and tree.token_count == pair.tokens
    assert not tree.segments[0].weights.any() and [segment.parent for segment in tree.segments] == [-1, 0, 0]


@pytest.mark.parametrize(
    ("workload", "first", "last", "norms", "void"),
    [("dpo", math.log(2), 0.5, (1.0, 0.5), False), ("dpo", 0.71, 0.5, (1.0, 0.5), True),
     ("dpo", 0.69315, 0.69315, (1.0, 0.5), True), ("grpo", 0.0, 0.0, (1.0, 0.5), False),
     ("grpo", 0.0, math.nan, (1.0, 0.5), True), ("grpo", 0.0, -0.1, (1.0, 0.0), True),
     ("grpo", 0.0, -0.1, (math.nan, 1.0), True)],
)  # fmt: skip
def test_a_figure_is_void_where_the_work_was_not_done(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    workload: str,
    first: float,
    last: float,
    norms: tuple[float, ...],
    void: bool,
) -> None:
    """Breaks when a trainer that computes another loss, or learns nothing in a step, is quoted."""
    script = module("preference")
    said = {"workload": workload, "system": "luthier", "loss": {"first": first, "last": last}, "grad_norms": norms}
    line = json.dumps(said)
    done = SimpleNamespace(returncode=0, stdout=f"noise\n{line}\n", stderr="")
    monkeypatch.setattr(script.subprocess, "run", lambda *given, **more: done)
    found = script.run(script.parse(["--home", str(home)]), workload, "luthier")
    assert ("failure" in found) is void


def test_the_table_has_medians_of_quiet_runs() -> None:
    """Breaks when a run beside other work is counted among those that had the machine."""

    def line(system: str, step: float, contended: bool = False) -> dict[str, Any]:
        return {"workload": "grpo", "system": system, "step_s": step, "sampling_s": step / 2, "contended": contended,
                "rows_per_second": 4 / step, "peak_memory_bytes": 10**9}  # fmt: skip

    lines = [line("luthier", 1), line("luthier", 3), line("luthier", 9, contended=True), line("trl", 8)]
    rows = module("preference").table([*lines, {"workload": "grpo", "system": "trl", "failure": "x"}])
    assert rows[1][:9] == ["grpo", "luthier", "2", "2.00", "4.00", "1.00", "4.00", "1.00", "4.00"]
    assert rows[2][4] == "1.00" and len(rows) == 3
