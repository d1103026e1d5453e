"""Rows for an encoder hold the tokens that transformers gives, and each class stands where transformers puts it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.core.errors import DataError, RecipeError
from luthier.data.checks import check_rendered
from luthier.data.conversation import Choices, Conversation, Labelled, Message, Row, Tagged, Text
from luthier.data.prepare import Reading, make_renderer
from luthier.data.rendering.marked import longest_first
from luthier.data.rendering.rendered import TOKEN_ROLES, Rendered
from luthier.data.rendering.renderer import Renderer
from luthier.data.tokenizer import Tokenizer
from tests.data.kinds import KINDS, TEXTS, bert, roberta, row, t5, zoo

WORDS = ("Ada", "Lovelace", "unaffable", "New York", "ünïcode", "don't", ".")
TAGS = ("B", "I", "O", "P", "O", "O", "O")
ENCODERS = ("bert", "roberta")


def encoder(tokenizer: Tokenizer, **knobs: Any) -> Renderer:
    return make_renderer(tokenizer, Reading(kind="encoder", **knobs))[0]


def sound(made: Renderer, one: Row) -> list[Rendered]:
    views = made.render(one)
    assert [str(problem) for view in views for problem in check_rendered(view, made, one)] == []
    return views


def types_of(view: Rendered) -> list[int]:
    return [0] * len(view.tokens) if view.types is None else view.types.tolist()


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("pair", ["", "Second Text!"])
def test_a_text_or_a_pair_has_the_tokens_of_transformers(kind: str, pair: str) -> None:
    tokenizer = KINDS[kind]()
    made = encoder(tokenizer)
    for text in TEXTS:
        (view,) = sound(made, row(Labelled(text, "x", pair)))
        wanted = zoo(kind)(text, pair or None, return_token_type_ids=True)
        assert view.tokens.tolist() == wanted["input_ids"]
        assert types_of(view) == (wanted["token_type_ids"] if kind == "bert" else [0] * len(view.tokens))
        assert view.labels is not None and view.labels.tolist() == [0] + [-1] * (len(view.tokens) - 1)
        assert view.weights.tolist() == [1.0] + [0.0] * (len(view.tokens) - 1)
        for token, role, span in zip(view.tokens.tolist(), view.roles.tolist(), view.spans.tolist(), strict=True):
            name = TOKEN_ROLES[role]
            begins = span[0] >= len(text) + 1
            assert name == "template" if token in tokenizer.special_ids and span[0] == span[1] else True
            assert name in ("template", "pair") if begins and pair else name in ("template", "text")


@settings(deadline=None, max_examples=60)
@given(text=st.text(min_size=1, max_size=60), pair=st.text(max_size=60), limit=st.integers(16, 30))
def test_any_text_is_cut_as_transformers_cuts_it_or_refused(text: str, pair: str, limit: int) -> None:
    made = encoder(bert(), max_tokens=limit, over_length="truncate")
    try:
        (view,) = made.render(row(Labelled(text, "x", pair)))
    except DataError as error:
        assert "no token" in str(error)
        return
    wanted = zoo("bert")(text, pair or None, truncation="longest_first", max_length=limit)
    assert len(view.tokens) <= limit
    # Half a character is never left standing, so that a row may end one or two tokens before transformers' does.
    if len(view.tokens) == len(wanted["input_ids"]):
        assert view.tokens.tolist() == wanted["input_ids"] and types_of(view) == wanted["token_type_ids"]
    else:
        assert len(wanted["input_ids"]) == limit and len(view.tokens) >= limit - 6


@pytest.mark.parametrize(("one", "two", "limit"), [(40, 0, 20), (40, 5, 20), (5, 40, 20), (30, 40, 21), (40, 30, 20)])
def test_the_longer_text_of_a_pair_is_cut_first(one: int, two: int, limit: int) -> None:
    text, pair = "one " * one, "two " * two
    made = encoder(bert(), max_tokens=limit, over_length="truncate")
    (view,) = sound(made, row(Labelled(text, "x", pair)))
    wanted = zoo("bert")(text, pair or None, truncation="longest_first", max_length=limit)
    assert view.tokens.tolist() == wanted["input_ids"] and types_of(view) == wanted["token_type_ids"]
    assert view.labels is not None and view.labels[0] == 0
    assert made.counts.truncated == 1


def test_longest_first_leaves_no_room_empty() -> None:
    for first in range(12):
        for second in range(12):
            for room in range(25):
                kept = longest_first(first, second, room)
                assert sum(kept) == min(first + second, room)
                assert kept[0] <= first and kept[1] <= second


def test_long_rows_are_errors_or_dropped() -> None:
    long = row(Labelled("one " * 40, "x"), 6)
    with pytest.raises(DataError, match=r"rows\.jsonl:7:1: the row has 42 tokens; at most 20"):
        encoder(bert(), max_tokens=20).render(long)
    made = encoder(bert(), max_tokens=20, over_length="drop")
    assert made.render(long) == [] and made.counts.dropped == 1
    assert made.classes.names == ()


def aligned(words: tuple[str, ...]) -> tuple[list[int], list[int]]:
    """The ids of transformers, and its alignment: a word's place at its first token, -1 elsewhere."""
    made = zoo("bert")(list(words), is_split_into_words=True)
    before, labels = None, []
    for word in made.word_ids():
        labels.append(-1 if word is None or word == before else word)
        before = word
    return made["input_ids"], labels


def test_tags_stand_at_the_first_token_of_each_word() -> None:
    made = encoder(bert())
    (view,) = sound(made, row(Tagged(WORDS, TAGS)))
    ids, places = aligned(WORDS)
    assert view.tokens.tolist() == ids and view.labels is not None
    names = [made.classes.names[label] if label >= 0 else None for label in view.labels.tolist()]
    assert names == [TAGS[place] if place >= 0 else None for place in places]
    assert np.array_equal(view.weights > 0, view.labels >= 0)
    assert view.text == " ".join(WORDS)
    lovelace = view.spans[view.labels >= 0][1]
    assert "Lovelace".startswith(view.text[slice(*lovelace)])


def test_words_that_only_a_space_makes_whole_are_read_in_their_text() -> None:
    made = encoder(roberta())
    (view,) = sound(made, row(Tagged(WORDS, TAGS)))
    assert view.tokens.tolist() == zoo("roberta")(" ".join(WORDS))["input_ids"]
    assert view.labels is not None
    assert [made.classes.names[label] for label in view.labels[view.labels >= 0]] == list(TAGS)
    starts = [view.spans[place, 0] for place in np.flatnonzero(view.labels >= 0)]
    assert [view.text[start:].lstrip().startswith(word) for start, word in zip(starts, WORDS, strict=True)]


def test_a_word_without_a_token_is_noticed() -> None:
    made = encoder(bert())
    (view,) = sound(made, row(Tagged(("a", "\u200b", "b"), ("X", "Y", "Z"))))
    assert view.labels is not None and made.classes.names == ("X", "Z")
    assert made.counts.notices == {"a word has no token, so its tag is not trained": 1}
    with pytest.raises(DataError, match="none of the words has a token"):
        made.render(row(Tagged(("\u200b",), ("Y",))))


@pytest.mark.parametrize("kind", ENCODERS)
def test_tags_are_cut_with_their_words(kind: str) -> None:
    made = encoder(KINDS[kind](), max_tokens=16, over_length="truncate")
    (view,) = sound(made, row(Tagged(WORDS * 4, TAGS * 4)))
    assert len(view.tokens) <= 16 and view.labels is not None
    assert view.roles[-1] == TOKEN_ROLES.index("template")


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("limit", [None, 16, 23])
def test_a_text_is_cut_into_windows_that_hold_every_token_once(kind: str, limit: int | None) -> None:
    tokenizer = KINDS[kind]()
    made = encoder(tokenizer, max_tokens=limit)
    text = " ".join(TEXTS) * 3
    views = sound(made, row(Text(text)))
    assert (len(views) == 1) == (limit is None)
    first, last = zoo(kind)("")["input_ids"]
    for view in views:
        assert view.tokens[0] == first and view.tokens[-1] == last and len(view.tokens) <= (limit or 10**6)
        special = np.isin(view.tokens, list(tokenizer.special_ids))
        assert np.array_equal(view.weights, (~special).astype(np.float32)) and view.labels is None
    inside = np.concatenate([view.tokens[1:-1] for view in views])
    assert inside.tolist() == zoo(kind)(text, add_special_tokens=False)["input_ids"]


def test_what_an_encoder_cannot_be_given_is_named() -> None:
    made = encoder(bert())
    talk = Conversation((Message("user", "a"), Message("assistant", "b")))
    with pytest.raises(DataError, match=r"read as conversation, which an encoder cannot.*labelled \| tagged \| text"):
        made.render(row(talk))
    with pytest.raises(DataError, match="read as choices"):
        made.render(row(Choices("q", ("a", "b"), 0)))
    with pytest.raises(DataError, match="cannot be prompted"):
        made.prompt_ids([Message("user", "a")])
    with pytest.raises(DataError, match="no control token before a text"):
        encoder(t5()).render(row(Labelled("a", "x")))
    with pytest.raises(DataError, match="the second text has no token"):
        made.render(row(Labelled("a", "x", "\u200b")))
    with pytest.raises(DataError, match="the text has no token"):
        made.render(row(Text("\u200b")))
    with pytest.raises(RecipeError, match="an encoder is to be given conversation rows"):
        encoder(bert(), wanted=("conversation",))


def test_many_rows_at_once_are_the_same_as_one_by_one() -> None:
    rows = [row(Labelled(text, "x", pair), number) for number, text in enumerate(TEXTS) for pair in ("", "b")]
    many, alone = encoder(bert()), encoder(bert())
    staged = [many.stage(one) for one in rows]
    many.encode_ahead(staged)
    for one, each in zip(staged, rows, strict=True):
        made = many.finish(one)
        assert not isinstance(made, DataError)
        assert made[0].tokens.tolist() == alone.render(each)[0].tokens.tolist()
    assert many.counts == alone.counts


def test_checks_see_broken_rows() -> None:
    made = encoder(bert())
    labelled, tagged, text = row(Labelled("A film", "x", "B")), row(Tagged(WORDS, TAGS)), row(Text("A film it is"))

    def broken(one: Row, **changes: Any) -> set[str]:
        (view,) = made.render(one)
        return {problem.invariant for problem in check_rendered(replace(view, **changes), made, one)}

    (view,) = made.render(labelled)
    assert view.labels is not None and view.types is not None
    assert broken(labelled, labels=np.roll(view.labels, 1)) == {"class"}
    assert broken(labelled, labels=np.where(view.labels >= 0, 99, -1)) == {"class"}
    assert broken(labelled, labels=None) == {"class"}
    assert broken(labelled, weights=np.ones_like(view.weights)) == {"class"}
    assert broken(labelled, types=1 - view.types) == {"text"}
    assert broken(labelled, tokens=np.where(view.weights == 0, 2003, view.tokens)) == {"text"}
    (view,) = made.render(tagged)
    assert view.labels is not None
    assert broken(tagged, labels=np.where(view.labels >= 0, 0, -1)) == {"class"}
    (view,) = made.render(text)
    assert broken(text, weights=np.ones_like(view.weights)) == {"trained"}
    assert broken(text, weights=np.zeros_like(view.weights)) == {"trained"}
    assert broken(text, tokens=view.tokens[::-1].copy()) >= {"text"}


def test_an_uncased_tokenizer_claims_no_bos() -> None:
    assert (bert().bos_id, bert().adds_bos, bert().stop_ids) == (None, False, frozenset())


def test_texts_are_compared_as_the_tokenizer_folds_them() -> None:
    tokenizer = bert()
    for text in TEXTS:
        ids = tokenizer.encode(text)[0]
        assert tokenizer.reads_alike(ids, text)
        assert not tokenizer.reads_alike(ids[1:], text) and not tokenizer.reads_alike(ids, text + "x")
    unknown = tokenizer.encode("a \U0001f984 b")[0]
    assert tokenizer.raw.unk_token_id in unknown.tolist()
    assert tokenizer.reads_alike(unknown, "A \U0001f984 b") and not tokenizer.reads_alike(unknown, "A \U0001f984 c")
