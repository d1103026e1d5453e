"""What result lines say together: gates, summaries, and the document with its tables and pictures."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.lines import REFERENCE, line_of, module

PEERS = [
    line_of("trl-stock", rate=20, memory=4 * 10**9),
    line_of("llamafactory-tuned", rate=50, memory=2 * 10**9),
    line_of("trl-tuned", rate=9999, memory=1, valid=False, checks={"first_loss": False}),
]


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
    rows = results.table(lines, baseline="trl-stock")
    assert rows[1] == ["luthier", "120 (100-300)", "1.00", "3.00", "61", "50%", "400", "3 of 6"]
    assert rows[2][0] == "trl-stock (contended)"


def test_runs_and_sections_are_not_mixed() -> None:
    results = module("results")
    lines = [line_of(), line_of(run="r2"), line_of(run="r3", precision="float32"), line_of(run="r4", device="cuda")]
    assert results.sections(lines) == ["m1-lora-bfloat16", "m1-lora-float32", "m1-lora-bfloat16-cuda"]
    assert results.latest_run(lines, "m1-lora-bfloat16") == [lines[1]]


def test_summary_tells_stock_and_the_fastest_peer_that_counts() -> None:
    report = module("report")
    found = report.standing("m1-lora-bfloat16", [line_of(), *PEERS])
    assert (found.stock.system, found.rival.system) == ("trl-stock", "llamafactory-tuned")
    text = report.summary([found])
    assert "| `m1-lora-bfloat16` | 100 | 5.00 | 2.00 | llamafactory-tuned | 0.50 | 61 |" in text
    assert "(c)" not in text
    alone = report.standing("s", [line_of(contended=True)])
    assert "| `s` (c) | 100 | - | - | - | - | 61 |" in report.summary([alone])
    assert report.standing("s", PEERS) is None and "No measurement" in report.summary([])


def test_section_says_what_was_measured_and_what_was_left_out() -> None:
    lines = [line_of(), line_of(contended=True), *PEERS]
    text = module("report").section(lines, picture="picture.svg")
    assert "3 timed steps of 16 rows after 1, 1,000 real tokens, 400 of them with a loss" in text
    assert "![Speed over peak memory of each system](picture.svg)" in text
    assert "- luthier: 1 contended left out." in text and "- trl-tuned: 1 void, failing first_loss." in text
    assert "- luthier, trl-stock, llamafactory-tuned, trl-tuned: torch 2." in text
    assert "| trl-tuned | - | - | - | - | - | - | 0 of 1 |" in text


def test_report_replaces_only_its_own_part() -> None:
    tables = module("tables")
    begin, end = "<!-- benchmarks/report.py: lora begin -->", "<!-- benchmarks/report.py: lora end -->"
    once = tables.place("# Title\n\nwords\n", "first", "benchmarks/report.py: lora")
    twice = tables.place(once + "after\n", "second", "benchmarks/report.py: lora")
    assert twice == f"# Title\n\nwords\n\n{begin}\nsecond\n{end}\nafter\n"
    both = tables.place(twice, "other", "benchmarks/report.py: full")
    assert both.startswith(twice) and "full begin" in both
    with pytest.raises(SystemExit, match="only one of"):
        tables.place(begin, "text", "benchmarks/report.py: lora")


def test_a_document_gets_its_parts_and_pictures(tmp_path: Path) -> None:
    document = tmp_path / "performance.md"
    document.write_text("# Performance\n\nprose\n", "utf-8")
    lines = [line_of(), *PEERS, line_of(workload="m2-lora", run="r2")]
    module("report").write(document, lines)
    once = document.read_text("utf-8")
    module("report").write(document, lines)
    assert document.read_text("utf-8") == once and once.startswith("# Performance\n\nprose\n")
    for name in ("m1-lora-bfloat16", "m2-lora-bfloat16", "summary"):
        assert once.count(f"report.py: {name} begin") == 1
    assert sorted(path.name for path in tmp_path.glob("*.svg")) == [
        "performance-m1-lora-bfloat16.svg", "performance-m2-lora-bfloat16.svg"
    ]  # fmt: skip


def test_picture_has_a_dot_and_a_name_for_each_system_that_counts() -> None:
    report, plot = module("report"), module("plot")
    shown = report.dots([line_of(), line_of(rate=120), *PEERS])
    root = ElementTree.fromstring(plot.draw(shown, "a < b"))
    texts = [item.text for item in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"luthier", "trl-stock", "llamafactory-tuned"} <= set(texts) and "trl-tuned" not in texts
    # A dot for each and one for each word of the legend, of which one is luthier's own name.
    assert len(list(root.iter("{http://www.w3.org/2000/svg}circle"))) == 3 + 3
    assert root[0].text == "a < b"


def test_labels_do_not_lie_on_each_other_or_outside() -> None:
    plot = module("plot")
    places = [(300.0, 100.0, "one-system"), (302.0, 101.0, "another"), (298.0, 104.0, "third"), (630.0, 100.0, "edge")]
    found = plot.labels(places)
    dots = [(x - plot.DOT, x + plot.DOT, y + 4) for x, y, _ in places]
    for index, label in enumerate(found):
        assert not plot._touches(label, [*dots, *map(plot._extent, found[:index])])
        left, right, _ = plot._extent(label)
        assert left >= 0 and right <= plot.WIDTH


@pytest.mark.parametrize("torn", ['{"run": "r2", "system": "lu', '{"run": "\xc3', "[1]"])
@pytest.mark.parametrize("script", ["report", "generate_report"])
def test_a_line_that_a_killed_process_has_left_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], script: str, torn: str
) -> None:
    """Breaks when results that took hours cannot be read for one line, or that is not told, or the next is lost too."""
    results = module("results")
    path = tmp_path / {"report": "results.jsonl", "generate_report": "generate.jsonl"}[script]
    line = line_of(run="2026-01-01T00:00:00Z", later_tokens_per_second=3.0, first_tokens_s=0.5)
    if script == "generate_report":
        line |= {"workload": "m1-1"}
    results.append_line(path, line)
    results.append_line(path, {**line, "system": "trl-stock" if script == "report" else "transformers"})
    whole = results.read_lines(path)
    with path.open("ab") as file:
        file.write(torn.encode("latin-1"))
    results.append_line(path, {**line, "repetition": 1})
    assert results.read_lines(path) == [*whole, {**line, "repetition": 1}]
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--home", str(tmp_path)])
    assert module(script).main() == 0
    said = capsys.readouterr()
    assert f"{path}:3 is left out: it is no whole JSON object" in said.err and "| luthier |" in said.out
