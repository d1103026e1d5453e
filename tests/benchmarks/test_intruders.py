"""The scripts about intruders: their counts agree, and the page shows what the kept results say."""

from __future__ import annotations

import importlib
import json
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
    for line in intruder_ranks.table(found).splitlines():
        assert line in page
    assert (DOCS / "intruder-ranks.svg").read_text("utf-8") == intruder_ranks.draw(found)
    assert [(each.family, each.rank) for each in found] == [(run[0], run[1]) for run in intruder_ranks.runs()]
