"""The benchmark runner without any peer: order, command lines, failures, resumed runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.lines import BENCHMARKS, line_of, module

FAKE_WORKER = """
import json, sys
system = sys.argv[sys.argv.index("--system") + 1]
if system == "broken":
    sys.exit("it does not work")
line = json.loads(LINE) | {"system": system}
print("noise before the line")
print(json.dumps({"loss": 10.5, "grad_norm": 2.0} if system == "reference" else line))
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Systems named one, two and broken, and a model that needs no preparing; the folder of results."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE_WORKER.replace("LINE", repr(json.dumps(line_of()))), "utf-8")
    sft, systems = module("sft"), module("systems")
    made = {name: systems.System(str(script), "tuned") for name in ("one", "two", "broken")}
    monkeypatch.setattr(sft, "SYSTEMS", made)
    monkeypatch.setattr(sft, "REFERENCE_SYSTEM", systems.System(str(script), "ours"))
    (tmp_path / "m1").mkdir()
    (tmp_path / "m1" / "digest.txt").write_text("digest\n", "utf-8")
    return tmp_path


def session(home: Path, **changes: Any) -> Any:
    values = {"home": home, "tier": "quick", "precision": "bfloat16", "device": "cpu", "seed": 0, "threads": 2,
              "limit": 60.0, "resume": False, "commit": "abc"}  # fmt: skip
    return module("sft").Session(**(values | changes))


def tier(*systems: str, repetitions: int = 2) -> Any:
    return module("workloads").Tier(4, 1, repetitions, systems)


def test_order_interleaves() -> None:
    assert module("sft").order(["a", "b"], 2) == [(0, "a"), (0, "b"), (1, "a"), (1, "b")]


def test_a_line_a_process_and_a_failure_ends_nothing(fake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, failed = module("sft").measure("m1-lora", tier("one", "broken", "two"), session(fake))
    assert failed and [line["system"] for line in lines] == ["one", "two", "one", "two"]
    assert all(line["valid"] and line["process_wall_s"] >= 0 for line in lines)
    results = module("results")
    assert results.read_lines(fake / "results.jsonl") == lines
    told = results.read_lines(fake / "failures.jsonl")
    assert [(line["system"], line["repetition"]) for line in told] == [("broken", 0), ("broken", 1)]
    assert "it does not work" in capsys.readouterr().err and "it does not work" in told[0]["failure"]


def test_a_resumed_run_makes_what_is_missing(fake: Path) -> None:
    sft = module("sft")
    first, _ = sft.measure("m1-lora", tier("one", repetitions=1), session(fake))
    both = tier("one", "two")
    lines, _ = sft.measure("m1-lora", both, session(fake, resume=True))
    assert [(line["repetition"], line["system"]) for line in lines] == [(0, "one"), (0, "two"), (1, "one"), (1, "two")]
    assert {line["run"] for line in lines} == {first[0]["run"]}
    results = fake / "results.jsonl"
    assert len(module("results").read_lines(results)) == 4
    results.write_text(results.read_text("utf-8").replace('"contended": false', '"contended": true', 1), "utf-8")
    again, _ = sft.measure("m1-lora", both, session(fake, resume=True))
    assert [(line["repetition"], line["system"]) for line in again[4:]] == [(0, "one")]


@pytest.mark.parametrize(
    "changes", [{"commit": "def"}, {"seed": 1}, {"threads": 1}, {"tier": "full"}, {"precision": "float32"}]
)
def test_other_work_is_not_resumed(changes: dict[str, Any]) -> None:
    names = ("workload", "tier", "precision", "device", "seed", "threads", "commit", "data_digest")
    line, results = line_of(), module("results")
    same = {name: line[name] for name in names}
    assert results.begun([line], same, tier()) == [line]
    assert results.begun([line], same | changes, tier()) == []
    assert results.begun([line], same, module("workloads").Tier(9, 1, 1, ())) == []
    for commit in ("abc+", "unknown"):
        assert results.begun([line_of(commit=commit)], same | {"commit": commit}, tier()) == []


def test_command_names_the_work_and_the_settings() -> None:
    sft, systems = module("sft"), module("systems")
    words = sft.command(
        "trl-tuned", systems.SYSTEMS["trl-tuned"], workload="m2-fixed", tier=tier(), session=session(Path("/home"))
    )
    assert words[:2] == ["/home/venv-trl/bin/python", str(BENCHMARKS / "sft_trl.py")]
    assert "--grouped" in words and words[words.index("--workload") + 1] == "m2-fixed"
    assert json.loads(words[words.index("--settings") + 1]) == {"gradient_checkpointing": False}


@pytest.mark.parametrize(
    "bad", [["--systems", "trl-stok"], ["--warm", "0"], ["--systems", "trl-stock"], ["--workloads", "m3"]]
)
def test_bad_arguments_are_refused(bad: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        module("sft").parse(["--home", str(tmp_path), *bad])


def test_a_tier_leaves_out_what_cannot_run_here(tmp_path: Path) -> None:
    sft = module("sft")
    args = sft.parse(["--home", str(tmp_path), "--tier", "full", "--repetitions", "7"])
    assert sft.tier_of("m1-lora", args).systems == ("luthier",)
    for peer in ("trl", "llamafactory"):
        python = tmp_path / f"venv-{peer}" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.touch()
    everything = sft.tier_of("m1-lora", args)
    assert everything.systems == module("workloads").WORKLOADS["m1-lora"].full.systems and everything.repetitions == 7
    args.precision = "float32"
    assert not any("autocast" in name for name in sft.tier_of("m1-lora", args).systems)


def test_pins_are_exact_and_torch_comes_first() -> None:
    peers = module("setup_peers")
    for peer, bare in peers.PEERS.items():
        pins = (BENCHMARKS / f"peers-{peer}.txt").read_text("utf-8").split()
        assert all(pin.count("==") == 1 for pin in pins)
        first, rest, *alone = peers.calls(pins, bare)
        assert first == [pins[0]] and pins[0].startswith("torch==") and set(first) <= set(rest)
        assert alone == ([["--no-deps", next(pin for pin in pins if pin.startswith(f"{bare}=="))]] if bare else [])
        assert sorted({*rest, *(alone[0][1:] if alone else [])}) == sorted(pins)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("sft", "--threads 0"), ("sft", "--limit -1"), ("sft", "--repetitions 0"), ("sft", "--seed -1"),
        ("generate", "--threads 0"), ("generate", "--limit 0"), ("generate", "--repetitions -2"),
        ("generate_report", "--repetitions 0"), ("preference", "--rows 0"), ("preference", "--warm 0"),
        ("preference", "--limit nan"), ("merge", "--repetitions 0"), ("startup", "--repetitions 0"),
        ("serve", "--clients 0"), ("serve", "--requests -1"), ("serve", "--pause -1"), ("seeds", "--texts 0"),
        ("seeds", "--rounds 0"), ("checkpoint", "--megabytes 0"), ("few_rows", "--threads 0"),
        ("many_rows", "--threads two"), ("intruders", "--rank 0"), ("gpu_check", "--seconds 0"),
        ("qlora_quality", "--steps 1.5"),
    ],
)  # fmt: skip
def test_counts_of_nothing_are_refused_before_anything_is_done(
    script: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks when a number is found to be none after minutes, or a run measures nothing and calls that good."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *words.split()])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        module(script).main()
    assert ended.value.code == 2 and not list(tmp_path.iterdir())
    option, value = words.split()
    assert f"argument {option}: it is {value}; a " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        ("sft", "--warm 4 --steps 4", "--warm 4 leaves none of --steps 4"),
        ("preference", "--warm 6", "--warm 6 leaves none of --steps 6"),
        ("merge", "--only megekit", "--only 'megekit' is in no name of a system; there are luthier"),
        ("startup", "--only steps", "--only 'steps' is in no name of a measure; there are luthier --help"),
    ],
)
def test_a_run_that_would_measure_nothing_is_refused(
    script: str, words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--home", str(tmp_path), *words.split()])
    with pytest.raises(SystemExit) as ended:
        module(script).main()
    assert ended.value.code == 2 and said in capsys.readouterr().err and not list(tmp_path.iterdir())
