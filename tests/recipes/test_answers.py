"""Questions made of held-out rows, and the answers to them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from luthier.core.errors import RecipeError
from luthier.data.prepare import Prepared, Reading, prepare
from luthier.data.tokenizer import Tokenizer
from luthier.model.files.sources import SEEDLING, resolve_source
from luthier.recipes.comparing.answers import answered, questions, trained_prompts, write_answers
from luthier.recipes.opening.opened import open_named


@pytest.fixture
def data(tmp_path: Path) -> Prepared:
    """Rows in any order, with one, two or three answers to a prompt; all are held out but one more for the last."""
    rows = [{"question": "Say c.", "answer": "x"}]
    rows += [{"question": f"Say {name}.", "answer": f"{name} {n}"} for n in range(3) for name in ("a", "b", "c")[n:]]
    turns = [("user", "Hi."), ("assistant", "Yes?"), ("user", "Say d."), ("assistant", "d")]
    chat = {"messages": [{"role": role, "content": content} for role, content in turns]}
    paths = tmp_path / "train.jsonl", tmp_path / "held.jsonl", tmp_path / "chat.jsonl"
    for path, some in zip(paths, (rows[:1], rows[1:], [chat]), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in some), "utf-8")
    tokenizer = Tokenizer.load(resolve_source(SEEDLING))
    return prepare(paths[0], tokenizer, Reading(), evaluation=list(paths[1:]), cache=tmp_path / "cache")


def test_rows_with_one_prompt_are_one_question(data: Prepared) -> None:
    """Breaks when a reference is lost or is another's, turns before the last are, or a training row is asked."""
    found = questions(data, 9, seed=0, max_new_tokens=8)
    assert [one.references for one in found] == [("a 0",), ("b 0", "b 1"), ("c 0", "c 1", "c 2"), ("d",)]
    assert [trained_prompts(data, asked, max_new_tokens=8) for asked in (found, found[:2])] == [1, 0]
    opened = open_named(SEEDLING)
    assert np.array_equal(found[1].prompt, opened.prompt("Say b."))
    assert opened.text(found[3].prompt).count("Say d.") == 1 and "Yes?" in opened.text(found[3].prompt)


def test_fewer_questions_are_drawn_and_keep_all_their_references(data: Prepared) -> None:
    """Breaks when the first of a sorted file are asked, or the draw is another one next time."""
    draws = [tuple(one.references for one in questions(data, 2, seed=seed, max_new_tokens=8)) for seed in range(12)]
    assert draws[3] == tuple(one.references for one in questions(data, 2, seed=3, max_new_tokens=8))
    everything = {one.references for one in questions(data, 9, seed=0, max_new_tokens=8)}
    assert set(sum(draws, ())) == everything and len(set(draws)) > 2 and all(len(draw) == 2 for draw in draws)
    nothing = replace(data, held_out=replace(data.train, indices=data.train.indices[:0]))
    with pytest.raises(RecipeError, match="1 rows to train and none held out"):
        questions(nothing, 2, seed=0, max_new_tokens=8)


def test_answers_are_what_the_model_says_to_each_prompt_by_itself(data: Prepared, tmp_path: Path) -> None:
    """Breaks when answers change places, control tokens stay in them, or what stands before a prompt is not seen."""
    opened = open_named(SEEDLING)
    asked = questions(data, 9, seed=0, max_new_tokens=8)
    found = answered(opened.model, data, asked, max_new_tokens=8)
    alone = [answered(opened.model, data, [one], max_new_tokens=8)[0] for one in asked]
    assert found == alone and not any("<" in answer for answer in found)
    before = opened.prompt("Something else.")
    shown = answered(opened.model, data, asked[:1], max_new_tokens=8, before=before)
    joined = type(asked[0])(np.concatenate([before, asked[0].prompt]), ("x",))
    assert shown == answered(opened.model, data, [joined], max_new_tokens=8)
    write_answers(tmp_path / "x.jsonl", data, asked, found)
    rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text("utf-8").splitlines()]
    assert [row["answer"] for row in rows] == found and rows[1]["references"] == ["b 0", "b 1"]
    assert "Say a." in rows[0]["prompt"]
