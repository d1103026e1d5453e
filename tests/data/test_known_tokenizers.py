"""A tokenizer whose facts are known is what transformers would make of the same files, and nobody asks transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.data import known_tokenizers, tokenizer
from luthier.data.tokenizer import Tokenizer
from tests.data import kinds
from tests.data.kinds import TEXTS
from tests.tiny import tiny_tokenizer

MAKERS: dict[str, Callable[[], Any]] = {
    "tiny": tiny_tokenizer,
    "bert": lambda: kinds.bert().raw,
    "roberta": lambda: kinds.roberta().raw,
    "t5": lambda: kinds.t5().raw,
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What transformers is asked to read, with a cache that knows no tokenizer."""
    monkeypatch.setattr(known_tokenizers, "cache_folder", lambda: tmp_path / "cache")
    seen: list[str] = []
    read = tokenizer.read_tokenizer

    def noting(files: Any) -> Any:
        seen.append(files.source)
        return read(files)

    monkeypatch.setattr(tokenizer, "read_tokenizer", noting)
    return seen


def saved(kind: str, place: Path) -> Path:
    MAKERS[kind]().save_pretrained(str(place))
    (place / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    return place


@pytest.mark.parametrize("kind", MAKERS)
def test_what_is_known_is_what_was_asked(kind: str, asked: list[str], tmp_path: Path) -> None:
    """Breaks when a start from memory has another vocabulary, other marks or other ends, or asks once more."""
    folder = saved(kind, tmp_path / "model")
    asked.clear()  # making one may have asked for its model
    first, second = Tokenizer.load(folder), Tokenizer.load(folder)
    assert len(asked) == 1
    assert second == first and second.facts == first.facts and second.specials == first.specials
    assert second.special_tokens == first.special_tokens and second.vocabulary == first.vocabulary
    for text in TEXTS:
        for one, other in zip(first.encode(text), second.encode(text), strict=True):
            assert np.array_equal(one, other)
        ids, _ = first.encode(text)
        assert second.decode(ids) == first.decode(ids)
    assert second.token_text(5) == first.token_text(5)
    for place in ("a", "b"):
        (first if place == "a" else second).save(tmp_path / place)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    assert len(list((tmp_path / "b").iterdir())) >= 2 and len(asked) == 1
    # Whoever wants the object of transformers gets it, once.
    assert second.raw is second.raw and second.raw.get_vocab() == first.raw.get_vocab() and len(asked) == 2


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "tokenizer.json": lambda said: said["added_tokens"][0].update(lstrip=True),
    "tokenizer_config.json": lambda said: said.update(eos_token="<|start|>"),
    "generation_config.json": lambda said: said.update(eos_token_id=3),
    "config.json": lambda said: said.update(eos_token_id=2),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_file_that_has_changed_is_asked_about(name: str, asked: list[str], tmp_path: Path) -> None:
    """Breaks when a fact outlives the file that it follows from."""
    folder = saved("tiny", tmp_path / "model")
    before = Tokenizer.load(folder)
    said = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    CHANGES[name](said)
    (folder / name).write_text(json.dumps(said))
    after = Tokenizer.load(folder)
    assert len(asked) == 2 and Tokenizer.load(folder) == after and len(asked) == 2
    assert name == "config.json" or after.facts != before.facts


def test_a_new_template_is_asked_about(asked: list[str], tmp_path: Path) -> None:
    folder = saved("tiny", tmp_path / "model")
    Tokenizer.load(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert Tokenizer.load(folder).chat_template == "{{ messages }}" and len(asked) == 2


def test_what_transformers_changes_is_left_to_it(asked: list[str], tmp_path: Path) -> None:
    """Breaks when the library's reading of a file is taken where transformers adds a token of its own."""
    folder = saved("tiny", tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "mask_token": "<|no such token|>"}))
    sizes = {Tokenizer.load(folder).vocabulary_size for _ in range(2)}
    assert len(asked) == 2 and sizes == {129}


DAMAGES = ["", "{", "[]", "{}", '{"facts": {}, "beside": {}}', "one fact less", "a text for a number",
           "no texts beside"]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_memory_that_is_damaged_is_made_anew(damage: str, asked: list[str], tmp_path: Path) -> None:
    """Breaks when half a file in the cache ends a start, or is believed."""
    folder = saved("tiny", tmp_path / "model")
    before = Tokenizer.load(folder)
    [path] = (tmp_path / "cache" / known_tokenizers.FOLDER).iterdir()
    said = json.loads(path.read_text())
    if damage == "one fact less":
        del said["facts"]["roles"]
    if damage == "a text for a number":
        said["facts"]["eos_ids"] = ["1"]
    if damage == "no texts beside":
        said["beside"] = {"tokenizer_config.json": 1}
    path.write_text(json.dumps(said) if " " in damage and "{" not in damage else damage)
    assert Tokenizer.load(folder) == before and len(asked) == 2
    assert Tokenizer.load(folder) == before and len(asked) == 2


def test_nothing_is_cut_or_filled_up(asked: list[str], tmp_path: Path) -> None:
    """Breaks when the file's own settings cut texts of a tokenizer that is known."""
    folder = saved("tiny", tmp_path / "model")
    raw = MAKERS["tiny"]()
    raw.backend_tokenizer.enable_truncation(4)
    raw.backend_tokenizer.enable_padding(length=99)
    raw.backend_tokenizer.save(str(folder / "tokenizer.json"))
    text = "the end of it " * 9
    for _ in range(2):
        own = Tokenizer.load(folder)
        assert own.decode(own.encode(text)[0]) == text
        assert own.backend.truncation is None and own.backend.padding is None
    assert len(asked) == 1


def test_a_known_tokenizer_imports_no_transformers(tmp_path: Path) -> None:
    """Breaks when a start takes the time of transformers for a few numbers."""
    folder = saved("tiny", tmp_path / "model")
    program = f"""
import sys
from pathlib import Path
from luthier.data import known_tokenizers
from luthier.data.tokenizer import Tokenizer
known_tokenizers.cache_folder = lambda: Path({str(tmp_path / "cache")!r})
made = Tokenizer.load({str(folder)!r})
print(made.decode(made.encode("the dog")[0]), "transformers" in sys.modules, sep="|")
"""
    said = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
            for _ in range(2)]  # fmt: skip
    assert said == ["the dog|True", "the dog|False"]
