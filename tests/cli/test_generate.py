"""`luthier generate`: one answer as it grows, several, in a form, and beside those of others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.commands import luthier


def test_what_grows_on_the_terminal_is_what_json_tells(finished: Path, llama: Path) -> None:
    """Breaks when the stream drops or repeats a piece."""
    ask = ("generate", finished, "-p", "x", "--max-new-tokens", 12)
    shown = luthier(*ask).must(0).out
    assert shown.removesuffix("\n") == luthier(*ask, "--json").must(0).json["answers"][0]["text"]
    drafted = luthier(*ask, "--drafts", 4).must(0).out
    assert drafted == shown
    ahead = luthier(*ask, "--draft-model", llama).must(0)
    assert ahead.out == shown and "tokens were right" in ahead.err


def test_equal_prompts_draw_answers_of_their_own(finished: Path) -> None:
    """Breaks when the second choice of one prompt is the first of the next."""
    ask = ("generate", finished, "-p", "x", "-p", "x", "--choices", 2, "--temperature", 1.5, "--max-new-tokens", 12)
    told = luthier(*ask, "--json").must(0).json["answers"]
    assert len({tuple(answer["tokens"]) for answer in told}) == 4


def test_choices_are_listed_and_models_stand_side_by_side(finished: Path, llama: Path) -> None:
    """Breaks when several answers are streamed into each other, or a column has another's answers."""
    drawn = ("--temperature", 1.0, "--max-new-tokens", 3)
    told = luthier("generate", finished, "-p", "x", "--choices", 3, *drawn, "--json").must(0).json["answers"]
    assert [answer["choice"] for answer in told] == [0, 1, 2]
    assert len({tuple(answer["tokens"]) for answer in told}) > 1
    both = ("generate", finished, "--beside", llama, "-p", "x", "-p", "y", *drawn)
    found = luthier(*both, "--json").must(0).json["answers"]
    assert [(answer["model"], answer["prompt"]) for answer in found] == [
        (str(finished), "x"), (str(finished), "y"), (str(llama), "x"), (str(llama), "y"),
    ]  # fmt: skip
    alone = luthier("generate", llama, "-p", "x", "-p", "y", *drawn, "--json").must(0).json["answers"]
    assert [answer["tokens"] for answer in found[2:]] == [answer["tokens"] for answer in alone]
    table = luthier(*both).must(0).out
    assert "prompt" in table and "x" in table and "y" in table


def test_an_answer_is_one_of_those_that_may_be(finished: Path) -> None:
    """Breaks when a form is taken and not heeded."""
    for seed in range(3):
        ask = ("generate", finished, "-p", "x", "--temperature", 2.0, "--seed", seed)
        assert luthier(*ask, "--one-of", "red", "--one-of", "blue sky").must(0).out in ("red\n", "blue sky\n")


def test_a_schema_is_heeded_where_the_package_is_there(finished: Path, tmp_path: Path) -> None:
    """Breaks when an answer is no JSON of the schema."""
    pytest.importorskip("llguidance")
    schema = tmp_path / "schema.json"
    properties = '"properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": false'
    schema.write_text('{"type": "object", ' + properties + '}')
    said = luthier("generate", finished, "-p", "x", "--schema", schema, "--max-new-tokens", 60).must(0).out
    assert json.loads(said)["n"] in (1, 2)


def test_what_does_not_fit_together_is_refused(finished: Path, tmp_path: Path) -> None:
    """Breaks when one of two settings is dropped in silence."""
    ask = ("generate", finished, "-p", "x")
    luthier(*ask, "--regex", "a", "--one-of", "b").must(2, "--regex and --one-of were given; one of them")
    luthier(*ask, "--beams", 2, "--temperature", 1).must(2, "2 beams were asked for")
    luthier(*ask, "--choices", 0).must(2, "choices is 0; at least 1")
    luthier(*ask, "--schema", tmp_path / "none.json").must(69, "there is no file")
    bad = tmp_path / "bad.json"
    bad.write_text("[1]")
    luthier(*ask, "--schema", bad).must(65, "it holds a list; write one JSON schema into it")
    luthier(*ask, "--adapter", tmp_path, "--beside", finished).must(2, "were given; one of them")
