"""The benchmark of preference pairs: its rows, our trees of them, and what makes a figure void."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.benchmarks.lines import module


def job(home: Path, **changes: Any) -> Any:
    given = {"home": home, "system": "luthier", "model": "m1", "pairs": 3, "steps": 4, "warm": 1}
    return module("pairs_work").Job(**(given | changes))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "m1").mkdir()
    rows = [json.dumps({"input_ids": list(range(i, i + 400))}) for i in range(0, 8000, 400)]
    (tmp_path / "m1" / "rows.jsonl").write_text("\n".join(rows), "utf-8")
    return tmp_path


def test_every_system_gets_the_same_pairs(home: Path) -> None:
    """Breaks when a peer learns from other rows, or an answer is longer than it is said to be."""
    work = module("pairs_work")
    found = work.pairs(job(home))
    assert found == work.pairs(job(home, system="trl")) and len(found) == 12
    assert {len(pair.prompt) for pair in found} == {work.PROMPT}
    answers = [answer for pair in found for answer in (pair.chosen, pair.rejected)]
    assert all(work.SHORTEST <= len(answer) <= work.LONGEST for answer in answers)
    assert found[0].tokens == len(found[0].prompt) + len(found[0].chosen) + len(found[0].rejected)


def test_a_pair_weighs_one(home: Path) -> None:
    """Breaks when long answers weigh more, or a prompt is learned from."""
    pair = module("pairs_work").pairs(job(home))[0]
    tree = module("pairs_luthier").tree_of(pair, 5)
    assert tree.weight == pytest.approx(1) and tree.row == 5 and tree.token_count == pair.tokens
    assert not tree.segments[0].weights.any() and [segment.parent for segment in tree.segments] == [-1, 0, 0]


@pytest.mark.parametrize(
    ("first", "last", "void"), [(math.log(2), 0.5, False), (0.71, 0.5, True), (0.69315, 0.69315, True)]
)
def test_a_figure_is_void_where_the_work_was_not_done(
    home: Path, monkeypatch: pytest.MonkeyPatch, first: float, last: float, void: bool
) -> None:
    """Breaks when a trainer that computes another loss, or changes nothing, is quoted."""
    script = module("pairs")
    line = json.dumps({"system": "luthier", "loss": {"first": first, "last": last}})
    done = SimpleNamespace(returncode=0, stdout=f"noise\n{line}\n", stderr="")
    monkeypatch.setattr(script.subprocess, "run", lambda *given, **more: done)
    found = script.run(script.parse(["--home", str(home)]), "luthier")
    assert ("failure" in found) is void


def test_the_table_has_medians_of_quiet_runs() -> None:
    """Breaks when a run beside other work is counted among those that had the machine."""
    def line(system: str, rate: float, contended: bool = False) -> dict[str, Any]:
        return {"system": system, "pairs_per_second": rate, "tokens_per_second": 100 * rate,
                "peak_memory_bytes": 10**9, "contended": contended}  # fmt: skip

    lines = [line("luthier", 4), line("luthier", 6), line("luthier", 1, contended=True), line("trl", 1)]
    rows = module("pairs").table([*lines, {"system": "trl", "failure": "x"}])
    assert rows[1] == ["luthier", "2", "5.00", "5.00", "500", "1.00", "1.00"] and rows[2][2] == "1.00"
