"""Vocabularies of several parents: matched by text, united where tokens were added, refused where text is cut anew."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from luthier.core.errors import CorruptError, RecipeError
from luthier.kernels.floats import FLOAT32
from luthier.merge.parents import Parent
from luthier.merge.vocabulary import Choice, United, united
from tests.merge.models_of import WIDTH, folder, tensors

WORDS = ["a", "b", "c", "d"]


def parents(home: Path, *added: list[str], words: list[list[str]] | None = None, rows: int = 0) -> list[Parent]:
    found = []
    for number, more in enumerate(added):
        own = words[number] if words else WORDS
        height = rows or len(own) + len(more)
        place = folder(home / str(number), tensors(seed=number + 1, rows=height), words=own, added=more)
        found.append(Parent.open("ABC"[number], str(place)))
    return found


def union(home: Path, *added: list[str], choice: Choice = "auto") -> tuple[list[Parent], United]:
    opened = parents(home, *added)
    return opened, united(opened, choice)


def test_one_vocabulary_is_left_alone(tmp_path: Path) -> None:
    """Breaks when rows are gathered one by one where they lie side by side."""
    assert union(tmp_path, ["<x>"], ["<x>"])[1] == United()


def test_added_tokens_are_matched_by_text_and_not_by_number(tmp_path: Path) -> None:
    """Breaks when <x> of one model is merged with <y> of the other because both are row 4."""
    _, found = union(tmp_path, ["<x>", "<y>"], ["<y>", "<z>"], ["<x>", "<y>"])
    assert found.count == 7 and list(found.more) == ["<z>"] and found.more["<z>"]["id"] == 6
    assert [found.rows[number].tolist() for number in range(3)] == [
        [0, 1, 2, 3, 4, 5, -1], [0, 1, 2, 3, -1, 4, 5], [0, 1, 2, 3, 4, 5, -1]
    ]  # fmt: skip
    assert "1 tokens of B ('<z>') are added" in found.notices[0]
    assert "B lacks 1 of 7 tokens, and has 2 under another number" in " ".join(found.notices)


def test_with_first_the_others_tokens_are_left_out_and_counted(tmp_path: Path) -> None:
    """Breaks when tokens go without a word."""
    _, found = union(tmp_path, ["<x>"], ["<x>", "<z>"], choice="first")
    assert found.count == 5 and not found.more and found.rows[1].tolist() == [0, 1, 2, 3, 4]
    assert found.notices[0] == "tokenizer: 1 tokens of B ('<z>') are left out"


def test_rows_that_no_token_has_keep_their_number(tmp_path: Path) -> None:
    """Breaks when an embedding with room at its end is cut to its tokens, or grows though there is room."""
    opened = parents(tmp_path, ["<x>"], ["<z>"], rows=8)
    found = united(opened, "auto")
    assert found.count == 8
    assert found.rows[0].tolist() == [0, 1, 2, 3, 4, -1, 6, 7] and found.rows[1].tolist() == [0, 1, 2, 3, -1, 4, 6, 7]


def test_another_way_of_cutting_text_cannot_be_united(tmp_path: Path) -> None:
    """Breaks when ordinary tokens of another tokenizer are added as if they were control tokens."""
    opened = parents(tmp_path, [], [], words=[WORDS, ["a", "c", "b", "e", "f"]])
    with pytest.raises(RecipeError, match=r"B cuts text otherwise than A: 2 tokens .*'e', 'f'"):
        united(opened, "auto")
    found = united(opened, "first")
    assert found.rows[1].tolist() == [0, 2, 1, -1]


def test_a_missing_row_is_filled_from_those_that_have_it(tmp_path: Path) -> None:
    """Breaks when a token that one model lacks is merged with zeros."""
    from luthier.merge.plan import Wanted, plan
    from luthier.merge.settings import Setting
    from luthier.merge.source import Source
    from tests.mergers_of import merger

    opened, found = union(tmp_path, ["<x>"], ["<z>"])
    even = (Setting.of(1, "weight"),) * 2
    wanted = Wanted(merger("linear"), (0, 1), None, even, FLOAT32, vocabulary=found.rows)
    planned = plan(opened, wanted)
    job = next(job for job in planned.jobs if job.name == "lm_head.weight")
    assert job.slot.shape == (6, WIDTH)
    one, two = (parent.shards.read("lm_head.weight") for parent in opened)
    part = Source(opened, job).part(3, 3)
    np.testing.assert_allclose(part.models[0], np.stack([one[3], one[4], two[4]]))
    np.testing.assert_allclose(part.models[1], np.stack([two[3], one[4], two[4]]))


def test_files_that_are_no_tokenizer_and_none_at_all(tmp_path: Path) -> None:
    """Breaks when rows of two sizes are matched by number, or a broken file is a traceback."""
    opened = parents(tmp_path / "a", [], ["<x>"])
    (tmp_path / "a/1/tokenizer.json").write_text(json.dumps({"model": []}))
    with pytest.raises(CorruptError, match="no tokenizer"):
        united(opened, "auto")
    (tmp_path / "a/1/tokenizer.json").unlink()
    with pytest.raises(RecipeError, match=r"B has no tokenizer.json, and embeddings have \[4, 5\] rows"):
        united(opened, "auto")
