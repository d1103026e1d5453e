"""What the data commands show is what a run trains on."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.core.errors import DataError, RecipeError
from luthier.recipes.inspect_data import check_file, measure, reading, show_rows
from tests.cli.commands import chat, luthier, write_rows

PLAIN = reading(None, "auto", "answers", None, "raise", None)


def test_the_trained_tokens_are_the_answer_and_its_end(rows: Path, llama: Path) -> None:
    shown = show_rows(str(rows), str(llama), PLAIN, rows=3)
    assert shown["files"][0]["format"] == "messages"
    for row, colour in zip(shown["rows"], ("red", "blue", "green"), strict=True):
        assert "".join(token["text"] for token in row["tokens"] if token["weight"]) == f"{colour}<|end|>"
        whole = "".join(token["text"] for token in row["tokens"])
        assert whole.startswith("<|start|>user\nthe colour of ") and whole.endswith("<|end|>\n")


def test_no_more_rows_are_read_than_shown(tmp_path: Path, llama: Path) -> None:
    own = write_rows(tmp_path / "rows.jsonl", [chat(str(n), "y") for n in range(30)])
    own.write_text(own.read_text("utf-8") + "broken\n", encoding="utf-8")
    assert len(show_rows(str(own), str(llama), PLAIN, rows=2)["rows"]) == 2
    with pytest.raises(DataError, match=":31:1"):
        show_rows(str(own), str(llama), PLAIN, rows=31)
    with pytest.raises(DataError, match=":31:1"):
        measure(str(own), str(llama), PLAIN)


def test_a_check_counts_every_row_once_and_shows_the_first_problems(tmp_path: Path, llama: Path) -> None:
    bad = [chat("x" * n, "y" * 40) for n in range(25)]
    own = write_rows(tmp_path / "rows.jsonl", [*(chat(str(n), "y") for n in range(30)), *bad])
    found = check_file(str(own), str(llama), reading(None, "auto", "answers", 40, "raise", None))
    assert (found.read, found.kept, found.rejected, found.problem_count) == (55, 30, 25, 25)
    assert len(found.problems) == 20 and f"{own}:31:" in found.problems[0]
    with pytest.raises(DataError, match="25 problems in 55 rows"):
        found.demand()
    told = luthier("data", "check", own, "--model", llama, "--max-tokens", 40, "--json").must(65, "25 problems")
    assert '"clean": false' in told.out.splitlines()[0]


def test_what_is_wrong_with_many_rows_alike_is_one_line(tmp_path: Path, llama: Path) -> None:
    """Breaks when a template that refuses every row hides what else is wrong."""
    rows = [*[chat("x" * 40, "y") for _ in range(25)], {"messages": "none"}, chat("x", "")]
    own = write_rows(tmp_path / "rows.jsonl", rows)
    found = check_file(str(own), str(llama), reading(None, "auto", "answers", 40, "raise", None))
    assert found.problem_count == 27 and len(found.problems) == 3
    assert f"{own}:1:" in found.problems[0] and "(and 24 rows alike)" in found.problems[0]
    assert any(f"{own}:26:" in problem for problem in found.problems)


def test_columns_and_what_is_trained_can_be_said(tmp_path: Path, llama: Path) -> None:
    own = tmp_path / "table.csv"
    own.write_text("mr,ref\nname[Blue],a blue place\n", encoding="utf-8")
    how = reading(None, "auto", "answers", None, "raise", ["prompt=mr", "answer=ref"])
    shown = show_rows(str(own), str(llama), how, rows=1)["rows"][0]
    assert "".join(token["text"] for token in shown["tokens"] if token["weight"]) == "a blue place<|end|>"
    everything = reading(None, "auto", "all", None, "raise", ["prompt=mr", "answer=ref"])
    tokens = show_rows(str(own), str(llama), everything, rows=1)["rows"][0]["tokens"]
    assert sum(bool(token["weight"]) for token in tokens) > 12
    with pytest.raises(RecipeError, match="no pair"):
        reading(None, "auto", "answers", None, "raise", ["prompt"])
    with pytest.raises(RecipeError, match="--train-on"):
        reading(None, "auto", "some", None, "raise", None)


def test_the_histogram_holds_every_row(rows: Path, llama: Path) -> None:
    found = measure(str(rows), str(llama), PLAIN)
    assert sum(found.histogram.counts) == found.counts["rows"] == 40
    assert found.histogram.token_count == found.counts["tokens"] and found.files[0]["format"] == "messages"
