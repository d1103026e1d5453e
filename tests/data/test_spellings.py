"""Spellings say what the tokenizer's own decoder says, whatever the tokens are."""

from __future__ import annotations

import random

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from luthier.data import spellings as spellings_module
from luthier.data.spellings import BYTE_OF, Spellings
from luthier.data.tokenizer import Tokenizer
from tests.data.test_words import backend, seedling, way

__all__ = ["way"]


def tokenizer_of(tokens: list[str]) -> Backend:
    made = Backend(models.BPE({token: place for place, token in enumerate(tokens)}, []))
    made.decoder = decoders.ByteLevel()
    return made


@pytest.mark.parametrize("make", [backend, seedling])
def test_any_tokens_say_what_the_tokenizer_decodes(make, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half characters among them: most draws are no UTF-8."""
    monkeypatch.setattr(spellings_module, "_AT_ONCE", 70)
    monkeypatch.setattr(spellings_module, "_MANY", 0)
    monkeypatch.setattr(spellings_module, "is_compiled", lambda: True)
    tokenizer = make()
    tokenizer.add_special_tokens(["<é 中 >", "<|end|>"])
    spellings = Spellings.of(tokenizer)
    assert spellings is not None
    draw = random.Random(0)
    size = tokenizer.get_vocab_size()
    for count in (0, 1, 2, 3, 5, 20, 200):
        for _ in range(100):
            ids = [draw.randrange(size) for _ in range(count)]
            wanted = tokenizer.decode(ids, skip_special_tokens=False)
            assert spellings.text(ids) == spellings.text(np.array(ids, np.int32)) == wanted
    assert (spellings._native is not None) == (way == "C++")


def test_bytes_that_are_no_characters_read_the_same() -> None:
    """Each byte is a token of its own here, drawn so that characters begin, break off and go on wrongly."""
    tokenizer = tokenizer_of(list(BYTE_OF))
    spellings = Spellings.of(tokenizer)
    assert spellings is not None and sorted(BYTE_OF.values()) == list(range(256))
    places = {byte: place for place, byte in enumerate(BYTE_OF.values())}
    telling = bytes.fromhex("41 80 8f 90 9f a0 bf c0 c2 df e0 ed ef f0 f1 f4 f5 ff")
    draw = random.Random(0)
    for length in range(1, 7):
        for _ in range(500):
            ids = [places[byte] for byte in draw.choices(telling, k=length)]
            assert spellings.text(ids) == tokenizer.decode(ids, skip_special_tokens=False)


def test_a_token_that_is_added_later_is_spelled(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spellings_module, "_MANY", 0)
    monkeypatch.setattr(spellings_module, "is_compiled", lambda: True)
    tokenizer = tokenizer_of(["a", "b"])
    spellings = Spellings.of(tokenizer)
    ids = np.array([0, 2, 1], np.int32)
    assert spellings is not None and spellings.text([0, 2, 1]) == spellings.text(ids) == "ab"
    tokenizer.add_tokens(["<new>"])
    assert spellings.text([0, 2, 1]) == spellings.text(ids) == tokenizer.decode([0, 2, 1]) == "a<new>b"


def test_other_decoders_have_no_spellings(make_tokenizer) -> None:
    bare = tokenizer_of(["a"])
    bare.decoder = None
    mixed = tokenizer_of(["a"])
    mixed.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip("a", 1, 0)])
    assert Spellings.of(bare) is None and Spellings.of(mixed) is None
    metaspace: Tokenizer = make_tokenizer("metaspace")
    assert metaspace.spellings is None and metaspace.decode(metaspace.encode("a city")[0]).strip() == "a city"
