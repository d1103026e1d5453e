"""The scripts about intruders: their counts agree, and the page shows what the kept results say."""

from __future__ import annotations

import importlib
import json
import statistics
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_all_ways_of_counting_agree(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Breaks when a faster way gives another count than the published one, at a width where it is not the same way."""
    monkeypatch.setattr(sys, "argv", ["intruders.py", "--width", "336", "--rank", "4", "--repeats", "1"])
    importlib.import_module("intruders").main()
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said[1:]] == ["whole", "first", "later", "with"]
    counts = {line.rpartition("x  ")[2] for line in said[1:]}
    assert len(counts) == 1 and counts != {"0 intruders"}


def test_the_page_and_the_picture_are_made_of_the_kept_results() -> None:
    """Breaks when a figure of the page is not the one that was measured."""
    intruder_ranks = importlib.import_module("intruder_ranks")
    kept = json.loads((DOCS / "intruder-ranks.json").read_text("utf-8"))
    found = [intruder_ranks.Outcome(**run) for run in kept["runs"]]
    page = (DOCS / "probes.md").read_text("utf-8").replace("| all weights |", "| full |")
    for task in intruder_ranks.TASKS:
        assert intruder_ranks.table([each for each in found if each.task == task]) in page
    assert intruder_ranks.correlations(found) in page
    assert (DOCS / "intruder-ranks.svg").read_text("utf-8") == intruder_ranks.draw(found)
    asked = [(task, seed, *run[:2]) for seed in intruder_ranks.SEEDS for task in intruder_ranks.TASKS
             for run in intruder_ranks.runs()]  # fmt: skip
    assert [(each.task, each.seed, each.family, each.rank) for each in found] == asked


def test_values_that_tie_share_their_rank() -> None:
    """Breaks when a rank correlation depends on the order of the runs; the ranks are written out by hand."""
    correlation = importlib.import_module("intruder_ranks").rank_correlation
    pairs = [(1.0, 3.0), (2.0, 1.0), (2.0, 2.5), (5.0, 2.5), (0.0, 9.0), (2.0, -1.0)]
    ranks = [(2.0, 5.0), (4.0, 2.0), (4.0, 3.5), (6.0, 3.5), (1.0, 6.0), (4.0, 1.0)]
    expected = statistics.correlation(*zip(*ranks, strict=True))
    assert correlation(pairs) == correlation(pairs[::-1]) == pytest.approx(expected)
