"""Stdout is data and stderr is progress; one JSON line where JSON is asked for; no colour where nobody sees it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from luthier.core.paths import cache_folder
from tests.cli.commands import STEPS, chat, luthier, recipe_text, tree, write_rows

ANSI = "\x1b"
LINE = {"run", "status", "steps", "tokens", "loss", "tokens_per_second", "peak_memory_bytes"}


def test_train_ends_with_one_line_of_json_and_talks_on_stderr(tmp_path: Path, recipe: Path) -> None:
    told = luthier("train", recipe, "--run", tmp_path / "run", "--json").must(0, "step 8/8", "held-out loss")
    line = told.json
    assert set(line) == LINE and set(line["tokens"]) == {"total", "trained"}
    assert set(line["loss"]) == {"first", "last", "eval"}
    assert line["status"] == "finished" and line["steps"] == STEPS and line["run"] == str(tmp_path / "run")
    assert 0 < line["tokens"]["trained"] < line["tokens"]["total"]
    assert line["loss"]["last"] < line["loss"]["first"]
    assert line["tokens_per_second"] > 0 and line["peak_memory_bytes"] > 1_000_000
    assert ANSI not in told.err and "\r" not in told.err


def test_quiet_says_nothing_on_stderr_and_a_summary_on_stdout(tmp_path: Path, recipe: Path) -> None:
    told = luthier("train", recipe, "--run", tmp_path / "run", "--quiet").must(0)
    assert told.err == "" and ANSI not in told.out
    assert f"result  {tmp_path / 'run' / 'adapter'}" in told.out and "next    luthier generate" in told.out


def test_each_command_that_prints_prints_one_line_of_json(rows: Path, llama: Path, finished: Path) -> None:
    shown = luthier("data", "show", rows, "--model", llama, "--rows", 2, "--json").must(0).json
    assert [row["row"] for row in shown["rows"]] == [0, 1]
    for row in shown["rows"]:
        assert all(set(token) == {"id", "text", "role", "weight"} for token in row["tokens"])
        assert {token["weight"] for token in row["tokens"]} == {0.0, 1.0}
    text = "".join(token["text"] for token in shown["rows"][0]["tokens"] if token["weight"])
    assert text == "red<|end|>"
    check = luthier("data", "check", rows, "--model", llama, "--json").must(0).json
    assert check["clean"] and check["read"] == check["kept"] + check["rejected"] == 40
    stats = luthier("data", "stats", rows, "--model", llama, "--json").must(0).json
    assert sum(stats["counts"]) == stats["rendered"]["rows"] == 40
    run = luthier("run", "show", finished, "--json").must(0).json
    assert run["state"] == "finished" and set(run) >= LINE
    listed = luthier("run", "list", finished.parent, "--json").must(0).json
    assert [row["name"] for row in listed["runs"]] == ["finished"]
    assert luthier("run", "list", rows.parent, "--json").json == {"runs": []}
    assert luthier("describe", "lora", "--json").json["method"] == "lora"
    assert luthier("describe", "full", "--json").json["family"] == "adapters"
    both = luthier("describe", "linear", "--json").must(0).json["methods"]
    assert [each["family"] for each in both] == ["mergers", "schedules"]
    assert luthier("describe", "schedules/linear", "--json").must(0).json["family"] == "schedules"
    listed = luthier("describe", "adapters", "--json").must(0).json["methods"]
    assert {each["family"] for each in listed} == {"adapters"}
    described = luthier("describe", "--json").json["methods"]
    assert ("adapters", "ia3") in [(one["family"], one["method"]) for one in described]
    answers = luthier("generate", finished, "-p", "a", "-p", "b", "--max-new-tokens", 3, "--json").must(0).json
    assert [set(answer) for answer in answers["answers"]] == [{"prompt", "text", "tokens", "ended", "log_probs"}] * 2


def test_errors_are_json_too_and_the_sentence_stays_on_stderr(tmp_path: Path) -> None:
    told = luthier("train", tmp_path / "none.yaml", "--json").must(2, "error[recipe]: there is no recipe")
    assert told.json["error"]["exit_code"] == 2
    assert set(told.json["error"]) == {"code", "exit_code", "where", "received", "allowed", "do"}
    for usage, part in ((("train", "--bogus"), "--bogus"), (("train",), "Missing argument"), (("trian",), "trian")):
        told = luthier(*usage, "--json").must(2, part)
        assert told.json["error"]["code"] == "recipe" and part in told.json["error"]["received"]


def test_lengths_have_one_closing_line_and_the_format_comes_first(rows: Path, llama: Path) -> None:
    lines = luthier("data", "stats", rows, "--model", llama).must(0).out.splitlines()
    assert lines[0].startswith(f"{rows}: format messages (")
    assert [line for line in lines if " rows, " in line] == lines[-1:] and "% trained" in lines[-1]


def test_every_command_also_prints_for_people(rows: Path, llama: Path, finished: Path) -> None:
    said = {
        ("data", "show", rows, "--model", llama): ["trained: red<|end|>", "row 0"],
        ("data", "check", rows, "--model", llama): ["40 read = 40 kept + 0 rejected", "clean"],
        ("data", "stats", rows, "--model", llama): [f"{rows}: format messages", "\n40 rows, "],
        ("resume", finished, "--dry-run"): [f"{finished} is finished; there is nothing to go on with\n"],
        ("run", "list", finished.parent): ["finished", "lora", str(STEPS)],
        ("run", "show", finished): ["held-out loss", "saved, reloaded"],
        ("resume", finished): ["held-out loss", "saved, reloaded"],
        ("eval", finished): ["base  loss", "tuned loss"],
        ("describe",): ["adapters:", "prefix_tuning"],
        ("describe", "lora"): ["LoRA", "knobs:", "rank = 16"],
        ("describe", "schedules"): ["schedules:", "cosine"],
    }
    for command, parts in said.items():
        told = luthier(*command).must(0)
        assert ANSI not in told.out + told.err
        for part in parts:
            assert part in told.out, (command, part, told.out)


def test_colours_only_on_a_terminal_and_never_with_no_color(
    rows: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("data", "show", rows, "--model", llama, "--rows", 1)
    assert ANSI not in luthier(*command).out
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    coloured = luthier(*command).out
    assert f"{ANSI}[30;42m" in coloured and "trained: red" not in coloured
    assert "carries loss; context does not, and has the colour of its role" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    plain = luthier(*command).out
    assert "42m" not in plain and "36m" not in plain and "trained: red" in plain
    assert "each row in full, then the part that is trained" in plain and "colour of its role" not in plain
    monkeypatch.setenv("COLUMNS", "30")
    assert f"--- row 0 ({rows}:1:1): " in luthier(*command).out and " trained\n" in luthier(*command).out


def test_a_terminal_sees_a_bar_and_stdout_stays_data(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    told = luthier("train", recipe, "--run", tmp_path / "run", "--json").must(0)
    assert told.json["status"] == "finished" and ANSI not in told.out
    assert ANSI in told.err and f"{STEPS}/{STEPS}" in told.err and "training" in told.err
    assert luthier("run", "show", tmp_path / "run", "--json").json["steps"] == STEPS


def test_a_prompt_may_come_from_stdin(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("the colour of 3 is"))
    piped = luthier("generate", finished, "--prompt", "-", "--max-new-tokens", 3, "--json").must(0).json
    assert piped == luthier("generate", finished, "-p", "the colour of 3 is", "--max-new-tokens", 3, "--json").json


def test_dry_run_writes_nothing_and_says_where_each_value_comes_from(
    tmp_path: Path, recipe: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # A table is folded to a width that is asked for; in a pipe nobody asks, and its lines stay whole.
    monkeypatch.delenv("COLUMNS", raising=False)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "native").symlink_to(cache_folder() / "native")
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LUTHIER_SET__SEED", "7")
    command = ("train", recipe, "--set", "adapter.rank=2", "--run", "2026-11-20", "--dry-run")
    told = luthier(*command, "--json").must(0).json
    shown = luthier(*command).must(0).out
    assert {name for name in tree(tmp_path) if not name.startswith("cache")} == set()
    origins = {item["key"]: (item["value"], item["origin"]) for item in told["recipe"]}
    assert origins["adapter.rank"] == (2, "--set")
    assert origins["adapter.alpha"] == (8.0, f"{recipe}:4")
    assert origins["seed"] == (7, "LUTHIER_SET__SEED")
    assert origins["batch.micro_tokens"] == (4096, "default")
    assert origins["run"] == ("2026-11-20", "--run")
    assert all(origin for _, origin in origins.values())
    assert told["plan"]["steps"] == STEPS and told["plan"]["data"]["kept"] == 40
    count, trained = told["plan"]["parameters"], told["plan"]["trainable_parameters"]
    each = {"weights": 4 * count, "trained": 4 * trained, "gradients": 4 * trained, "optimizer": 8 * trained}
    assert each.items() <= told["plan"]["memory"].items()
    assert any(line.startswith("memory     about ") and "activations" in line for line in shown.splitlines())
    assert any(line.startswith("disk       about ") and "checkpoints of" in line for line in shown.splitlines())
    for key, (value, origin) in origins.items():
        assert any(line.split()[:1] == [key] and line.rstrip().endswith(origin) and str(value) in line
                   for line in shown.splitlines()), (key, shown)  # fmt: skip


def test_the_other_dry_runs_write_nothing_either(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = tree(finished)
    assert luthier("init", "--dry-run").must(0).out.startswith("# A luthier recipe")
    assert luthier("init", "mine.yaml", "--dry-run", "--json").must(0).json["recipe"] == "mine.yaml"
    assert luthier("demo", "--dry-run").must(0).json["model"] == "seedling"
    assert luthier("resume", finished, "--dry-run", "--json").must(0).json["state"] == "finished"
    assert tree(tmp_path) == {} and tree(finished) == before


def test_brackets_in_names_are_text_and_long_lines_stay_whole(tmp_path: Path, llama: Path) -> None:
    folder = tmp_path / "[red]x" / ("long-" * 30 + "[")
    folder.mkdir(parents=True)
    own = write_rows(folder / "rows[bold].jsonl", [chat(f"[/x] {n}", "[b]y[/b]") for n in range(10)])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_text(llama, tmp_path / "none"), encoding="utf-8")
    more = ("--set", f"data.train={json.dumps(str(own))}", "--set", "budget.steps=2", "--run", folder / "run")
    assert str(own) in luthier("train", recipe, *more, "--dry-run").must(0).out
    told = luthier("train", recipe, *more).must(0)
    assert any(line.startswith("8 rows to train") and line.endswith("2 steps") for line in told.err.splitlines())
    assert str(own) in luthier("data", "show", own, "--model", llama).must(0).out
    assert "trained: [b]y[/b]<|end|>" in luthier("data", "show", own, "--model", llama).out
    assert "finished" in luthier("run", "list", folder).must(0).out
