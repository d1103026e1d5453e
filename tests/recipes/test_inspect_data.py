"""What the data commands show is what a run trains on."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.core.errors import DataError, RecipeError
from luthier.recipes.inspect_data import check_file, measure, reading, show_rows
from tests.cli.commands import chat, luthier, write_rows
from tests.data.kinds import BERT_FOLDER

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


REVIEWS = [{"text": "A film", "label": "good"}, {"text": "The End", "label": "bad"}, {"text": "a dog", "label": "good"}]
ENCODER = reading(None, "auto", "answers", None, "raise", None, "encoder")


def test_classes_are_shown_beside_their_tokens_and_counted(tmp_path: Path) -> None:
    own = write_rows(tmp_path / "rows.jsonl", REVIEWS)
    shown = show_rows(str(own), str(BERT_FOLDER), ENCODER, rows=2)
    assert [token.get("class") for token in shown["rows"][0]["tokens"]] == ["good", None, None, None]
    assert shown["rows"][1]["tokens"][0]["class"] == "bad"
    found = check_file(str(own), str(BERT_FOLDER), ENCODER)
    assert (found.problem_count, found.classes) == (0, {"bad": 1, "good": 2})
    command = ("data", "show", own, "--model", BERT_FOLDER, "--for", "encoder", "--rows", 1)
    assert "class: [CLS] = good" in luthier(*command).must(0).out
    told = luthier("data", "check", own, "--model", BERT_FOLDER, "--for", "encoder").must(0).out
    assert "classes: bad 1, good 2" in told and "clean" in told


def test_classes_that_cannot_be_learned_are_problems(tmp_path: Path) -> None:
    own = write_rows(tmp_path / "rows.jsonl", [REVIEWS[0], REVIEWS[2]])
    held = write_rows(tmp_path / "held.jsonl", [REVIEWS[1], {"text": "x", "label": "odd"}])
    found = check_file(str(own), str(BERT_FOLDER), ENCODER, evaluation=str(held))
    assert found.problem_count == 2
    assert "every training row has the class 'good'" in found.problems[0]
    assert f"{held}:1:1: 2 held-out rows have classes that no training row has, first 'bad'" in found.problems[1]


def test_a_format_that_is_named_says_what_rows_mean(tmp_path: Path, llama: Path) -> None:
    own = write_rows(tmp_path / "rows.jsonl", REVIEWS)
    for how in (
        reading("labelled", "auto", "answers", None, "raise", None),
        reading(None, "auto", "answers", None, "raise", ["text=text", "label=label"]),
    ):
        found = check_file(str(own), str(llama), how)
        assert (found.problem_count, found.classes) == (0, {"bad": 1, "good": 2})
    assert check_file(str(own), str(llama), PLAIN).classes == {}
    text = reading("text", "auto", "answers", None, "raise", None, "encoder")
    assert check_file(str(own), str(BERT_FOLDER), text).classes == {}
    with pytest.raises(RecipeError, match="a causal decoder is to be given choices rows"):
        check_file(str(own), str(llama), reading("choices", "auto", "answers", None, "raise", None))
    with pytest.raises(RecipeError, match="--for is 'decoder'"):
        reading(None, "auto", "answers", None, "raise", None, "decoder")
    with pytest.raises(RecipeError, match="without start_id"):
        check_file(str(own), str(llama), reading(None, "auto", "answers", None, "raise", None, "seq2seq"))


def test_the_start_of_a_decoder_is_read_from_the_model(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (folder / name).write_bytes((BERT_FOLDER / name).read_bytes())
    (folder / "generation_config.json").write_text('{"decoder_start_token_id": 7}', encoding="utf-8")
    own = write_rows(tmp_path / "rows.jsonl", REVIEWS)
    how = reading(None, "auto", "answers", None, "raise", None, "seq2seq")
    shown = show_rows(str(own), str(folder), how, rows=1)
    assert [token["id"] for token in shown["rows"][0]["tokens"]][4] == 7
