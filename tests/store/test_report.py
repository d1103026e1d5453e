"""The report: what it says, what it escapes, and that nothing missing or broken keeps it from being written."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from luthier.core.errors import StorageError
from luthier.store.curves import Line, decimate, draw, smooth, tick_text, ticks, value_axis
from luthier.store.report import _metrics, render_report, write_report
from luthier.store.report_answers import marked

VOID = {"meta"}


class Tags(HTMLParser):
    """Checks that tags close in order; keeps headings and the addresses that a page would load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.loads: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.loads += [f"{key}={value}" for key, value in attrs if key in ("src", "href", "srcset", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


TIMES = {"seconds": 0.5, "source_seconds": 0.001}


def lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def events(steps: int = 60) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"kind": "start", "time": 1.7e9}, {"kind": "unheard-of", "step": 3}]
    for step in range(steps + 1):
        loss = 0.3 + 3 * math.exp(-step / 10)
        if step:
            numbers = {"loss": loss, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens": 100, "trained_tokens": 40}
            found.append({"kind": "step", "step": step, "time": 1.7e9 + step, **TIMES, **numbers})
        if step % 20 == 0:
            worst = [{"row": 7, "loss": 2.5}]
            found.append({"kind": "evaluation", "step": step, "loss": loss + 0.1, "rows": 4, "worst_rows": worst})
            found.append({"kind": "checkpoint", "step": step, "best": True})
    found.append({"kind": "bad_step", "step": 31, "what": "loss", "value": "NaN", "rows": [5, 9]})
    return found


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "orders"
    folder.mkdir()
    lines(folder / "events.jsonl", events())
    prompt = {"index": 0, "prompt": "Say <b>hello</b> & go", "reference": '{"n":12.50,"c":"Rome"}'}
    lines(
        folder / "samples.jsonl",
        [
            {**prompt, "step": 0, "base": "The market is open."},
            {**prompt, "step": 20, "tuned": '{"n":12.50,"c":"Bonn"}'},
            {**prompt, "step": 40, "tuned": '{"n":12.50,"c":"Bonn"}'},
            {**prompt, "step": 60, "tuned": '{"n":12.50,"c":"Rome"}'},
        ],
    )
    summary = {
        "run": "runs/orders",
        "status": "finished",
        "model": "seedling",
        "adapter": {"method": "lora", "rank": 16, "rslora": False, "rank_pattern": {}, "init": None, "dropout": 0.0},
        "steps": 60,
        "tokens": {"total": 6000, "trained": 2400},
        "loss": {"first": 3.0, "last": 0.3, "eval_first": 3.4, "eval": 0.41, "best": 0.4, "best_step": 40},
        "tokens_per_second": 1200.4,
        "train_seconds": 72.0,
        "peak_memory_bytes": 913_000_000,
        "trainable_parameters": 311_296,
        "parameters": 5_812_224,
        "result": "adapter",
        "proof": {"tensors": 84, "differs_from_start": True, "eval_loss": 0.41, "reloaded_loss": 0.41},
        "data": {"read": 100, "kept": 97, "rejected": 3, "files": ["rows.jsonl"], "rendered": {"trained_tokens": 2400}},
        "notices": ["3 rows were rejected"],
        "demo": {
            "before": {"exact_match": 0.004},
            "after": {"exact_match": 0.915},
            "forgetting": {"before": 2.3, "after": 2.4},
        },
    }
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    made_with = {"command": "/opt/bin/luthier train recipe.yaml --set 'run=<x>'", "folder": "/home/me/<work>"}
    (folder / "environment.json").write_text(json.dumps(made_with), encoding="utf-8")
    (folder / "recipe.yaml").write_text("model: seedling # <recipe>\n", encoding="utf-8")
    (folder / "worst_rows.json").write_text(
        json.dumps([{"row": 7, "loss": 2.5, "text": "</td><script>alert(1)</script>"}]), encoding="utf-8"
    )
    return folder


def test_it_is_one_file_that_loads_nothing(run: Path) -> None:
    assert write_report(run) == run / "report.html"
    page = (run / "report.html").read_text("utf-8")
    tags = Tags(page)
    assert tags.loads == [] and "link" not in tags.seen and "img" not in tags.seen
    assert not re.search(r"https?:|url\(|@import", page)
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


def test_the_verdict_comes_first_and_the_order_is_kept(run: Path) -> None:
    page = render_report(run)
    sentence = "Held-out loss fell from 3.400 to 0.410, best at step 40 with 0.400, on 2,400 trained tokens in 1 min"
    assert "lora (rank 16)" in page
    wanted = [
        "3 rows were rejected", "Before and after", "0.4 % →</span> 91.5 %", "<svg", "Tokens, time and memory",
        "2,400 (40.0 %)", "0.2 % of that", "913 MB", "311k of 5.8M (5.4 %)", "Rows kept", "Rows with the worst loss",
        "Proof", "0.410000", "in /home/me/&lt;work&gt;", ">luthier train recipe.yaml --set", "&lt;recipe&gt;",
    ]  # fmt: skip
    places = [page.index(text, page.index("<main>")) for text in (sentence, *wanted)]
    assert places == sorted(places)


def test_what_comes_from_files_is_escaped(run: Path) -> None:
    page = render_report(run)
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page
    assert "<b>hello" not in page and "Say &lt;b&gt;hello&lt;/b&gt; &amp; go" in page
    lines(run / "events.jsonl", [{"kind": "bad_step", "step": 1, "what": "</script><i>"}, *events()])
    assert "</script><i>" not in render_report(run)


def test_answers_are_compared_word_by_word_and_over_the_steps(run: Path) -> None:
    page = render_report(run)
    assert "exact match" in page
    assert "step 20 to 40" in page and "<mark>Bonn</mark>" in page
    assert marked("the red house", "the blue house") == ([("the ", False), ("red", True), (" house", False)], True)
    assert marked("same words", "same  words") == ([("same words", False)], True)
    assert marked("nothing alike here", "{1}") == ([("nothing alike here", False)], False)
    assert marked("", "x") == ([("", False)], True)


def test_bad_steps_and_checkpoints_are_marked(run: Path) -> None:
    page = render_report(run)
    assert "<title>bad step 31</title>" in page and "<title>checkpoint at step 40</title>" in page
    assert "loss (NaN)" in page and "5, 9" in page


def test_a_loss_that_rose_is_not_called_a_gain(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    summary["loss"] = {"eval_first": 1.0, "eval": 1.5, "best": 1.1, "best_step": 20}
    summary["proof"]["reloaded_loss"] = 0.9
    (run / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    page = render_report(run)
    assert "Held-out loss rose from 1.000 to 1.500, best at step 20 with 1.100" in page
    assert '<li class="broken">The reloaded files' in page


@pytest.mark.parametrize(
    "name", ["events.jsonl", "samples.jsonl", "summary.json", "recipe.yaml", "worst_rows.json"]
)
@pytest.mark.parametrize("damage", ["missing", "empty", "torn", "other", "binary"])
def test_any_file_may_be_missing_or_broken(run: Path, name: str, damage: str) -> None:
    path = run / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        broken = {"empty": b"", "torn": content[: len(content) * 2 // 3], "other": b'[1, "x", null]\n'}
        path.write_bytes(broken.get(damage, b"\xff\x00{\n"))
    page = write_report(run).read_text("utf-8")
    Tags(page)
    if damage == "missing" and name != "worst_rows.json":
        assert f"{name} is missing" in page
    if damage == "empty" and name == "summary.json":
        assert f"{name} is not complete JSON" in page
    if damage == "torn" and name.endswith(".jsonl"):
        assert f"{name}: 1 line was cut short or unreadable" in page


def test_an_empty_run_says_what_is_not_there(tmp_path: Path) -> None:
    page = write_report(tmp_path).read_text("utf-8")
    Tags(page)
    assert "No step of this run was recorded." in page and "not finished" in page and "luthier resume" in page


def test_an_unfinished_run_is_told_from_its_events(run: Path) -> None:
    (run / "summary.json").unlink()
    page = render_report(run)
    assert "Held-out loss fell from 3.400 to 0.407, on 2,400 trained tokens in 30 s." in page
    (run / "status.json").write_text('{"state": "failed", "reason": "disk <full>"}', encoding="utf-8")
    page = render_report(run)
    assert "failed" in page and "disk &lt;full&gt;" in page


@pytest.mark.parametrize("value", [{}, [], "x", True, None, "NaN", 1e308, -1e308, 5e-324, [[[]]], {"a": {"b": 1}}])
def test_values_of_any_kind_do_not_stop_it(run: Path, value: Any) -> None:
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    (run / "summary.json").write_text(json.dumps(dict.fromkeys(summary, value)), encoding="utf-8")
    keys = ("step", "loss", "grad_norm", "learning_rate", "time", "worst_rows", "rows", "tokens")
    kinds = ("step", "evaluation", "bad_step", "checkpoint")
    odd = [{"kind": kind, "step": 1, **{key: value}} for kind in kinds for key in keys]
    lines(run / "events.jsonl", events() + odd)
    lines(run / "samples.jsonl", [dict.fromkeys(("step", "index", "prompt", "reference", "base", "tuned"), value)])
    Tags(render_report(run))


def test_no_such_run(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no such run"):
        write_report(tmp_path / "nowhere")


def test_decimation_keeps_spikes_and_ends() -> None:
    values = [math.sin(index / 500) for index in range(50_000)]
    values[12_345], values[33_333] = 9.0, -9.0
    kept = decimate(values, most=1000)
    assert len(kept) <= 1000 and kept == sorted(set(kept))
    assert {0, 12_345, 33_333, 49_999} <= set(kept)
    assert decimate([1.0, 2.0, 3.0]) == [0, 1, 2]
    picture = draw([Line(style="raw", points=list(enumerate(values)))], "x", steps=(0, 50_000))
    assert picture.count(",") <= 1010 and len(picture) < 20_000


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.3, 3.4), (-2, 7), (1e-9, 3e-9), (0, 123_456), (5, 5.0001)])
def test_ticks_are_round_and_cover_the_axis(low: float, high: float) -> None:
    found = ticks(low, high)
    step = found[1] - found[0]
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-6)
    assert min(abs(mantissa - size) for size in (1, 2, 5)) < 1e-3
    assert 2 <= len(found) <= 11
    axis = value_axis([low, high], bottom=100, top=0)
    assert all(-1e-6 <= axis.place(value) <= 100 + 1e-6 for value in (low, high))


def test_axes_of_unusual_values() -> None:
    assert value_axis([2.0, 2.0], bottom=100, top=0).low < 2 < value_axis([2.0, 2.0], bottom=100, top=0).high
    assert value_axis([], bottom=100, top=0).ticks
    wide = value_axis([0.002, 9.0], bottom=100, top=0)
    assert wide.logarithmic and len(wide.ticks) >= 3
    assert not value_axis([0.0, 9.0], bottom=100, top=0).logarithmic


def test_smoothing_starts_at_the_first_value() -> None:
    assert smooth([4.0, 4.0, 4.0], span=10) == pytest.approx([4.0, 4.0, 4.0])
    assert smooth([1.0, 0.0], span=1) == [1.0, 0.0]


def test_tick_texts() -> None:
    assert [tick_text(value) for value in (0.0, 0.30000000000000004, 20_000, 2e-5, -1.5)] == [
        "0", "0.3", "20,000", "2e-5", "-1.5",
    ]  # fmt: skip


def test_metrics_of_an_objective_are_told_before_and_after(tmp_path: Path) -> None:
    """Breaks when a classifier's report does not say how often it was right, or a damaged summary breaks the page."""
    summary = {"metrics": {"accuracy": [0.5, 0.875], "odd": "x", "short": [1.0], "text": ["a", "b"]}}
    assert _metrics(summary) == [("Held-out accuracy", "0.500 before, 0.875 after")]


def test_a_run_of_rollouts_is_told_by_its_reward(tmp_path: Path) -> None:
    """Breaks when a report calls minus the reward a loss, hides a part of it, or draws shares on a logarithmic axis."""
    found: list[dict[str, Any]] = []
    for step in range(1, 31):
        share = step / 31
        parts = {"right": share**4, "form": share, "right/answered": 1.0}
        found += [
            {"kind": "rollout", "step": step, "reward": share, "parts": parts, "groups": 4, "alike": 3, "length": 5.0,
             "entropy": 1 / step, "leash": 0.0},
            {"kind": "step", "step": step, "loss": 0.001, "grad_norm": 1.0, "learning_rate": 1e-3},
        ]  # fmt: skip
    for step, value in ((0, 0.125), (15, 0.75), (30, 0.5)):
        told = {"loss": -value, "reward": value, "right": value, "form": 1.0, "worst_rows": [{"row": 3, "loss": 0.5}]}
        found.append({"kind": "evaluation", "step": step, **told})
    lines(tmp_path / "events.jsonl", found)
    page = render_report(tmp_path)
    Tags(page)
    assert "Held-out reward rose from 0.125 to 0.500" in page and "loss of" not in page
    for title in ("<h2>Reward</h2>", "Reward: right", "Reward: form", "Prompts with the lowest reward", "Below mean",
                  "Groups whose answers were all worth the same, %", "Parts of parts of the reward"):  # fmt: skip
        assert title in page, title
    rewards = page[page.index("Reward: right") : page.index("Tokens of an answer")]
    assert "logarithmic" not in rewards and rewards.count('class="line held"') >= 2
    assert 'ring held" cx' in page and "Leash" not in page
    assert "training reward" in page and "What the judge decided" not in page


def test_what_a_judge_decided_is_told_with_some_of_what_it_said(tmp_path: Path) -> None:
    """Breaks when a report of AI feedback says nothing of ties and places, or fails where its files are damaged."""
    policy, outer = tmp_path / "run" / "policy", tmp_path / "run"
    policy.mkdir(parents=True)
    lines(policy / "events.jsonl", events(20))
    figures = {"pairs": 9, "preferences": 6, "ties": 2, "failed": 1, "position_bias": 0.125, "decided_by_place": 0.25}
    (outer / "feedback.json").write_text(json.dumps(figures), encoding="utf-8")
    rows = [{"prompt": "<b>Who?</b>", "chosen": "Nobody.", "rejected": "I.", "probability": 0.75, "rationale": "calm"}]
    lines(outer / "preferences.jsonl", rows * 5)
    write_report(policy, into=outer)
    page = (outer / "report.html").read_text(encoding="utf-8")
    Tags(page)
    assert not (policy / "report.html").exists() and page.count("75.0 % sure") == 3
    for part in ("Became preferences", "+0.125", "25.0 %", "&lt;b&gt;Who?", "calm"):
        assert part in page, part
    (outer / "feedback.json").write_text("{", encoding="utf-8")
    assert "What the judge decided" not in render_report(policy, judged=outer)
