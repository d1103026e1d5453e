"""The quick ways to tokens and back change nothing: real rows under real templates, where these are on this machine."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from luthier.data.prepare import Prepared, Reading, prepare
from luthier.data.tokenizer import Tokenizer
from tests.data.test_templates import FILES

ROWS = Path(os.environ.get("LUTHIER_ROWS", Path(__file__).parents[3] / "shared" / "data"))
SOURCES = [f"{ROWS}/alpaca_en_demo.json#20", f"{ROWS}/gsm8k_train.jsonl#20", f"{ROWS}/glaive_toolcall_en_demo.json#8"]


@pytest.mark.skipif(not ROWS.is_dir(), reason="the collection of rows is not on this machine")
@pytest.mark.parametrize("template", ["instruction", "chatml", *map(str, FILES)], ids=lambda name: Path(name).stem)
def test_what_is_stored_is_what_the_tokenizer_alone_would_give(template: str, make_tokenizer, tmp_path: Path) -> None:
    quick: Tokenizer = make_tokenizer("bytes")
    assert quick.words is not None and quick.spellings is not None
    slow = replace(quick, words=None, spellings=None)
    reading = Reading(template=template, max_tokens=800, over_length="truncate", on_bad_row="skip")
    ours, theirs = (stored(each, reading, tmp_path / name) for name, each in (("quick", quick), ("slow", slow)))
    for name in ("tokens", "weights", "roles", "spans", "rows", "offsets"):
        assert np.array_equal(getattr(ours.store, name), getattr(theirs.store, name)), name
    assert ours.counts() == theirs.counts() and ours.notices == theirs.notices
    assert [str(each) for each in ours.report.rejects] == [str(each) for each in theirs.report.rejects]
    # Some templates refuse a system message or tools, none refuses all rows.
    assert len(ours.store) > 24


def stored(tokenizer: Tokenizer, reading: Reading, cache: Path) -> Prepared:
    return prepare(SOURCES, tokenizer, reading, cache=cache)
