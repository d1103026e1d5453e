"""Text as it grows: each push is a piece of what the whole reads as, for all kinds of tokenizers, with stop strings."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some
from tokenizers import Tokenizer as Backend

import luthier.assets
from luthier.core.errors import RecipeError
from luthier.data.forest import Ints
from luthier.infer.text import Decode, TextStream
from tests.data import kinds
from tests.data.conftest import SENTENCES, build
from tests.tiny import tiny_tokenizer

TEXTS = [
    *SENTENCES,
    "Hello wörld, I don't think it's bad.  Two spaces, and\n\n\ttabs.",
    "naïve café 中文 😀👩‍👩‍👧 ½ \u0301 end",
    " leading and trailing ",
    "   \n \n   ",
    "😀😀😀",
    "a",
]


@cache
def seedling() -> Backend:
    return Backend.from_file(str(Path(luthier.assets.__file__).parent / "seedling" / "tokenizer.json"))


@cache
def llama() -> Backend:
    """Pieces with a mark for spaces, and bytes for what no piece has, as in the tokenizers of Llama 2."""
    return build("legacy").raw.backend_tokenizer


BACKENDS: dict[str, Callable[[], Backend]] = {
    "seedling": seedling,
    "tiny": lambda: tiny_tokenizer().backend_tokenizer,
    "llama": llama,
    "mistral": cache(lambda: build("metaspace").raw.backend_tokenizer),
    "t5": lambda: kinds.t5().raw.backend_tokenizer,
    "bert": lambda: kinds.bert().raw.backend_tokenizer,
    "roberta": lambda: kinds.roberta().raw.backend_tokenizer,
}
BY_BYTES = ("seedling", "roberta")


def reader(backend: Backend, seen: list[int] | None = None) -> Decode:
    """What reads tokens; `seen` is told how many at a time."""

    def decode(tokens: Ints | list[int]) -> str:
        if seen is not None:
            seen.append(len(tokens))
        return str(backend.decode([int(token) for token in tokens], skip_special_tokens=False))

    return decode


def pieces(stream: TextStream, tokens: list[int]) -> list[str]:
    return [*(stream.push(token) for token in tokens), stream.end()]


def cut(text: str, stop: list[str]) -> tuple[str, str | None]:
    """By brute force: the text before the stop string that is complete first, and which one that is."""
    for end in range(len(text) + 1):
        met = [each for each in stop if text[:end].endswith(each)]
        if met:
            longest = max(met, key=len)
            return text[: end - len(longest)], longest
    return text, None


@pytest.mark.parametrize("name", BACKENDS)
def test_texts_come_out_whole_and_nothing_told_changes(name: str) -> None:
    """Breaks when a space at a seam is lost, or half a character is told."""
    backend = BACKENDS[name]()
    draw = random.Random(1)
    for _ in range(60):
        text = "".join(draw.choices([*TEXTS, "😀", " ", "\n", "é", "x"], k=draw.choice((1, 2, 5))))
        tokens = backend.encode(text, add_special_tokens=False).ids
        whole = reader(backend)(np.array(tokens, np.int32))
        told = pieces(TextStream(reader(backend)), tokens)
        assert "".join(told) == whole
        assert not any("\ufffd" in piece for piece in told) or "\ufffd" in whole


@pytest.mark.parametrize("name", [*BY_BYTES, "tiny", "t5", "bert"])
@given(data=some.data())
def test_any_tokens_come_out_as_they_read_together(name: str, data: some.DataObject) -> None:
    """Breaks when bytes that are no text are told too early, twice or never."""
    backend = BACKENDS[name]()
    tokens = data.draw(some.lists(some.integers(0, backend.get_vocab_size() - 1), max_size=40))
    if name in BY_BYTES and data.draw(some.booleans()):
        # Single bytes of characters of two to four bytes: halves of all kinds, and whole ones now and then.
        odd = [backend.token_to_id(chr(code)) for code in (0xC3, 0xE2, 0xF0, 0xFF)]
        near = [backend.token_to_id(letter) for letter in "ĤŁļĢģ" if backend.token_to_id(letter) is not None]
        tokens = data.draw(some.lists(some.sampled_from([*(each for each in odd if each is not None), *near])))
    whole = reader(backend)(np.array(tokens, np.int32))
    spelled = name in BY_BYTES and data.draw(some.booleans())
    told, stream = "", TextStream(reader(backend), spelled=spelled)
    for token in tokens:
        told += stream.push(token)
        assert whole.startswith(told)
    assert told + stream.end() == whole and stream.end() == ""
    told, stream, left = "", TextStream(reader(backend), spelled=spelled), list(tokens)
    while left:
        count = data.draw(some.integers(1, len(left)))
        told += stream.push_all(left[:count])
        left = left[count:]
        assert whole.startswith(told)
    assert told + stream.end() == whole


@pytest.mark.parametrize("name", ["seedling", "llama", "mistral", "t5", "bert", "roberta"])
@given(data=some.data())
def test_a_stop_string_ends_the_text_wherever_it_lies_in_the_tokens(name: str, data: some.DataObject) -> None:
    """Breaks when a stop is missed across tokens, told in part, or another one wins than the one complete first."""
    backend = BACKENDS[name]()
    text = data.draw(some.sampled_from(TEXTS)) + data.draw(some.text(alphabet="ab \n😀é", max_size=12))
    tokens = backend.encode(text, add_special_tokens=False).ids
    whole = reader(backend)(np.array(tokens, np.int32))
    stop = data.draw(some.lists(some.text(alphabet="ab \n😀é", min_size=1, max_size=3), max_size=3))
    for _ in range(data.draw(some.integers(0, 2))):
        start = data.draw(some.integers(0, max(0, len(whole) - 1)))
        stop.append(whole[start : start + data.draw(some.integers(1, 8))] or "a")
    wanted, which = cut(whole, stop)
    stream = TextStream(reader(backend), stop, spelled=name in BY_BYTES)
    told, met = "", False
    for count, token in enumerate(tokens, 1):
        told += stream.push(token)
        assert wanted.startswith(told)
        so_far = reader(backend)(np.array(tokens[:count], np.int32)).rstrip("\ufffd")
        met = met or any(each in so_far for each in stop)
        assert (stream.stopped is not None) == met
    assert told + stream.end() == wanted and stream.stopped == which
    at_once = TextStream(reader(backend), stop)
    assert at_once.push_all(tokens) + at_once.end() == wanted and at_once.stopped == which
    assert stream.end() == "" and (which is None or stream.push(tokens[0]) == "")


def test_a_stop_string_that_may_still_come_is_held_back() -> None:
    """Breaks when its beginning is told, or is not given back when it comes otherwise."""
    letters = "abcdef"

    def decode(tokens: Ints) -> str:
        return "".join(letters[token] for token in tokens)

    stream = TextStream(decode, ["abc", "cde"])
    assert [stream.push(letters.index(letter)) for letter in "fabdabab"] == ["f", "", "", "abd", "", "", "ab", ""]
    assert stream.end() == "ab" and stream.stopped is None
    stream = TextStream(decode, ["abc", "bc", "cde"])
    assert [stream.push(letters.index(letter)) for letter in "abcd"] == ["", "", "", ""]
    assert stream.stopped == "abc" and stream.end() == ""


@pytest.mark.parametrize("name", ["seedling", "llama", "t5", "bert"])
@pytest.mark.parametrize("kind", ["text", "halves", "the same", "random"])
def test_a_token_costs_the_same_at_the_end_of_a_long_text(name: str, kind: str) -> None:
    """Breaks when the window grows with the text, also where no character is ever whole."""
    backend = BACKENDS[name]()
    draw = random.Random(2)
    half = {"seedling": "ð", "llama": "<0xF0>"}.get(name, "a")
    tokens = {
        "text": backend.encode(" ".join(TEXTS) * 20, add_special_tokens=False).ids,
        "halves": [backend.token_to_id(half)] * 2000,
        "the same": [3] * 2000,
        "random": draw.choices(range(backend.get_vocab_size()), k=2000),
    }[kind][:2000]
    seen: list[int] = []
    stream = TextStream(reader(backend, seen), ["never to be seen"])
    told = "".join(pieces(stream, tokens))
    assert max(seen) <= 50 and sum(seen) <= 200 * len(tokens)
    if kind != "random" or name != "llama":
        assert told == reader(backend)(np.array(tokens, np.int32))


def test_what_is_skipped_is_no_text_and_does_not_part_its_neighbours() -> None:
    """Breaks when a control token is told, or cuts a character in two."""
    backend = seedling()
    tokens = backend.encode("é😀 b", add_special_tokens=False).ids
    end = 0
    mixed = [each for token in tokens for each in (end, token)]
    assert "".join(pieces(TextStream(reader(backend), skip=frozenset({end})), mixed)) == "é😀 b"
    assert "".join(pieces(TextStream(reader(backend)), mixed)).count(backend.id_to_token(end)) == len(tokens)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_continuation_keeps_the_space_it_begins_with(name: str) -> None:
    """Breaks when text that goes on is read as if it began."""
    backend = BACKENDS[name]()
    before, whole = (backend.encode(text, add_special_tokens=False).ids for text in ("Hello", "Hello world and"))
    assert whole[: len(before)] == before
    rest = whole[len(before) :]
    assert "".join(pieces(TextStream(reader(backend)), rest)) == "world and"
    assert "".join(pieces(TextStream(reader(backend), after=before), rest)) == " world and"


def test_a_token_without_text_does_not_begin_the_text_anew() -> None:
    """Breaks when what follows an empty token loses the space that decoders take from a beginning."""
    words = ["a", "", " b"]

    def decode(tokens: Ints) -> str:
        return "".join(words[token] for token in tokens).removeprefix(" ")

    assert "".join(pieces(TextStream(decode), [0, 1, 2, 1, 1, 2])) == "a b b"


@pytest.mark.parametrize("spelled", [False, True])
def test_half_a_character_of_the_prompt_becomes_whole(spelled: bool) -> None:
    """Breaks when the halves of a character on both sides of the seam are told as two marks."""
    backend = BACKENDS["roberta"]()
    tokens = [backend.token_to_id(letter) for letter in "ðŁĺĢ"]
    for at in range(1, 4):
        before = np.array([*backend.encode("ab").ids[1:-1], *tokens[:at]], np.int32)
        stream = TextStream(reader(backend), after=before, spelled=spelled)
        assert "".join(pieces(stream, tokens[at:])) == "😀"


def test_an_empty_stop_string_is_refused() -> None:
    """Breaks when every text ends before it begins."""
    with pytest.raises(RecipeError, match=r"stop strings \['a', ''\] hold an empty one"):
        TextStream(lambda tokens: "", ["a", ""])
