"""Tokens on disk are the rendered ones, are made once, and are made again when anything about them is off."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from luthier.core.errors import DataError, StorageError
from luthier.data.rendering.causal import CausalRenderer
from luthier.data.rendering.template import Template
from luthier.data.statistics import LengthHistogram
from luthier.data.token_store import TokenStore, cache_folder, store_key

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def made(make_tokenizer):
    tokenizer = make_tokenizer("bytes")
    return CausalRenderer(tokenizer, Template(CHATML, tokenizer.special_tokens, name="test"))


@pytest.fixture
def rows(talk):
    return [talk(("user", f"one {index}"), ("assistant", "two " * index + "end"), number=index) for index in range(5)]


class Counting:
    """Rows that know how often they were asked for, and the views that are made of them."""

    def __init__(self, rows, renderer):
        self.rows, self.renderer, self.asked = rows, renderer, 0

    def __call__(self, folder):
        self.asked += 1
        assert folder.is_dir()
        for row in self.rows:
            yield from self.renderer.render(row)


def test_views_come_back(made, rows, tmp_path):
    store = TokenStore.open_or_build(Counting(rows, made), made, key="k", folder=tmp_path)
    assert len(store) == 5
    fresh = CausalRenderer(made.tokenizer, made.template)
    for index, row in enumerate(rows):
        (wanted,) = fresh.render(row)
        found = store[index]
        for name in ("tokens", "weights", "roles", "spans"):
            assert np.array_equal(getattr(found, name), getattr(wanted, name))
            assert getattr(found, name).dtype == getattr(wanted, name).dtype
        assert found.row == index and found.text == ""
    assert store[-1].row == 4
    with pytest.raises(IndexError):
        store[5]
    assert store.lengths.tolist() == [len(store[index].tokens) for index in range(5)]
    assert store.token_count == fresh.counts.tokens and store.trained_count == fresh.counts.trained_tokens
    assert [path.name for path in tmp_path.iterdir()] == ["k"]


def test_made_once_and_recalled(made, rows, tmp_path):
    source = Counting(rows, made)
    TokenStore.open_or_build(source, made, key="k", folder=tmp_path)
    later = CausalRenderer(made.tokenizer, made.template)
    again = TokenStore.open_or_build(source, later, key="k", folder=tmp_path)
    assert source.asked == 1
    assert later.stop_ids == made.stop_ids == again.stop_ids and later.counts == made.counts == again.counts


def tear_short(place: Path) -> None:
    path = place / "tokens.npy"
    path.write_bytes(path.read_bytes()[:-4])


def lose_a_file(place: Path) -> None:
    (place / "spans.npy").unlink()


def lose_the_description(place: Path) -> None:
    (place / "store.json").unlink()


def foreign_key(place: Path) -> None:
    about = json.loads((place / "store.json").read_text())
    (place / "store.json").write_text(json.dumps({**about, "key": "other"}))


def pickled(place: Path) -> None:
    np.save(place / "rows.npy", np.array([{}], dtype=object), allow_pickle=True)


def not_even_json(place: Path) -> None:
    (place / "store.json").write_text("{")


@pytest.mark.parametrize("damage", [tear_short, lose_a_file, lose_the_description, foreign_key, pickled, not_even_json])
def test_damage_is_made_good(made, rows, tmp_path, damage):
    source = Counting(rows, made)
    wanted = TokenStore.open_or_build(source, made, key="k", folder=tmp_path).tokens.tolist()
    damage(tmp_path / "k")
    assert TokenStore.open(tmp_path / "k", key="k") is None
    again = TokenStore.open_or_build(source, made, key="k", folder=tmp_path)
    assert source.asked == 2 and again.tokens.tolist() == wanted


def test_a_row_that_fails_leaves_nothing(made, rows, talk, tmp_path):
    """Breaks when half a store stays behind and is found by the next run."""
    bad = talk(("user", "q"), ("tool", "x"), ("assistant", "it ends <|im_end|> early"), number=9)
    with pytest.raises(DataError, match="at which generation stops"):
        TokenStore.open_or_build(Counting([*rows, bad], made), made, key="k", folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tokens", "weights", "roles", "spans", "rows", "offsets"])
def test_a_flipped_bit_is_found(made, rows, tmp_path, name):
    """Breaks when a store is used whose bytes are not the ones that were written."""
    source = Counting(rows, made)
    wanted = TokenStore.open_or_build(source, made, key="k", folder=tmp_path).tokens.tolist()
    path = tmp_path / "k" / f"{name}.npy"
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    again = TokenStore.open_or_build(source, made, key="k", folder=tmp_path)
    assert source.asked == 2 and again.tokens.tolist() == wanted


def test_the_key_knows_everything(made, make_tokenizer, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("one")
    keys = {store_key([data], made)}
    keys.add(store_key([data], made, reading={"format": "alpaca"}))
    keys.add(store_key([data, data], made))
    for knobs in ({"train_on": "last"}, {"over_length": "drop"}, {"max_tokens": 99}):
        keys.add(store_key([data], CausalRenderer(made.tokenizer, made.template, **knobs)))
    other = Template(CHATML + " ", made.tokenizer.special_tokens, name="test")
    keys.add(store_key([data], CausalRenderer(made.tokenizer, other)))
    keys.add(store_key([data], CausalRenderer(make_tokenizer("metaspace"), made.template)))
    data.write_text("two")
    keys.add(store_key([data], made))
    assert len(keys) == 9
    with pytest.raises(StorageError):
        store_key([tmp_path / "none"], made)


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("LUTHIER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "luthier"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "luthier"


def test_an_empty_data_set(made, tmp_path):
    store = TokenStore.open_or_build(Counting([], made), made, key="k", folder=tmp_path)
    assert len(store) == 0 and store.token_count == 0


def test_histogram():
    lengths = [1, 2, 3, 4, 5, 8, 9, 100]
    power = LengthHistogram.of(lengths, trained_count=33)
    assert power.edges == (1, 2, 4, 8, 16, 32, 64, 128)
    assert power.counts == (1, 2, 2, 2, 0, 0, 1) and power.row_count == 8
    assert power.quantiles[0] == 1 and power.quantiles[-1] == 100 and power.trained_share == 0.25
    lines = power.draw(40).splitlines()
    assert max(map(len, lines[:-1])) <= 40 and "█" in lines[1] and "█" not in lines[4] and "25.0 %" in lines[-1]
    width = LengthHistogram.of(lengths, bins="width", bin_count=4)
    assert width.edges == (1, 26, 51, 76, 101) and width.counts == (7, 0, 0, 1)
    assert LengthHistogram.of([]).draw() == "no rows"
    assert LengthHistogram.of([0, 7, 7]).counts[0] == 1
    assert json.dumps(width.as_dict())
