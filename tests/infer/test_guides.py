"""Guided continuations of a model that says anything: what comes out always has the form that was asked for."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import BaseModel, ConfigDict, Field

import luthier.assets
from luthier.core.errors import MissingError, RecipeError
from luthier.data.tokenizer import Tokenizer
from luthier.infer.engine import Engine
from luthier.infer.grammars import Grammars
from luthier.infer.guides import Guide
from luthier.infer.request import Request
from luthier.infer.sampler import Chooser, choose
from luthier.model.speaker import Sampling
from tests import forests
from tests.data.conftest import build
from tests.tiny import tiny_tokenizer


@cache
def seedling() -> Tokenizer:
    return Tokenizer.load(Path(luthier.assets.__file__).parent / "seedling")


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "seedling": seedling,
    "bytes": cache(lambda: build("bytes")),
    "metaspace": cache(lambda: build("metaspace")),
}


@cache
def grammars(name: str) -> Grammars:
    return Grammars(TOKENIZERS[name]())


def any_text(name: str, guide: Guide, *, seed: int, most: int = 400, ending: float = 2.0) -> str | None:
    """What a model without any sense says under a guide; None when it came to no end.

    It likes to end, and does not like long strings, or most texts would never be whole.
    """
    tokenizer = TOKENIZERS[name]()
    stops = tokenizer.stop_ids
    chooser = Chooser(Sampling(temperature=1.0, seed=seed, stop_ids=tuple(stops)), np.array([1], np.int32), guide=guide)
    scores = torch.randn(tokenizer.vocabulary_size + 3, generator=torch.Generator().manual_seed(seed))
    closing = [token for text in ("}", "]", '"') for token in tokenizer.encode(text)[0].tolist()]
    scores[closing] += ending
    scores[list(stops)] += ending
    for _ in range(most):
        (said,) = choose([chooser], scores[None])
        if said.token in stops:
            return tokenizer.decode(chooser.said[:-1])
    return None


# ------------------------------------------------------------------------------------------------------------ grammars


class Colour(Enum):
    RED = "red"
    BLUE = "blue, or nearly so"


class Wheel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    size: int = Field(ge=10, le=29)
    spokes: list[int] = Field(max_length=4)


class Bicycle(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str = Field(min_length=1, max_length=8)
    colour: Colour
    sold: bool | None
    weight: float = Field(ge=0, le=20)
    wheels: list[Wheel] = Field(min_length=1, max_length=2)


class Tree(BaseModel):
    model_config = ConfigDict(extra="forbid")
    value: bool
    branches: list[Tree] = Field(max_length=2)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("kind", [Wheel, Bicycle, Tree])
def test_json_of_a_schema_validates_whatever_the_model_wants_to_say(name: str, kind: type[BaseModel]) -> None:
    """Breaks when a token that crosses the grammar's border is allowed, or the end is allowed too early."""
    pytest.importorskip("llguidance")
    make = grammars(name).json_schema(kind.model_json_schema())
    texts = [any_text(name, make(), seed=seed) for seed in range(30)]
    whole = [text for text in texts if text is not None]
    assert len(whole) >= 20 and len(set(whole)) > 4
    for text in whole:
        kind.model_validate_json(text)
        assert "\n" not in text


@pytest.mark.parametrize("name", TOKENIZERS)
def test_any_json_object(name: str) -> None:
    """Breaks when a list or a bare value passes for an object, or nothing does."""
    pytest.importorskip("llguidance")
    make = grammars(name).json_object()
    whole = [text for seed in range(30) if (text := any_text(name, make(), seed=seed, ending=6.0)) is not None]
    assert len(whole) >= 20
    assert all(isinstance(json.loads(text), dict) for text in whole) and any(json.loads(text) for text in whole)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("pattern", [r"[a-f]{3,5}", r"(yes|no|maybe so)!?", r"\d{4}-(0[1-9]|1[0-2])", "é+😀?"])
def test_a_regular_expression_matches_the_whole_text(name: str, pattern: str) -> None:
    """Breaks when the end is allowed before the expression is met, or text after it."""
    pytest.importorskip("llguidance")
    make = grammars(name).regex(pattern)
    whole = [text for seed in range(20) if (text := any_text(name, make(), seed=seed)) is not None]
    assert len(whole) >= 15 and len(set(whole)) > 1
    for text in whole:
        # Decoders take a space from the beginning of a text; none of the patterns begins with one.
        assert re.fullmatch(pattern, text), text


def test_stops_are_allowed_exactly_where_the_text_may_end() -> None:
    """Breaks when one of several stop tokens is left out, or is allowed inside."""
    pytest.importorskip("llguidance")
    tokenizer = TOKENIZERS["bytes"]()
    marks = {tokenizer.raw.convert_tokens_to_ids(mark) for mark in ("</s>", "<|eot_id|>")}
    made = Grammars(tokenizer, stops=frozenset(marks))
    guide = made.regex("ab?")()
    told = []
    for letter in ("a", "b"):
        mask = guide.allowed()
        assert mask is not None
        told.append(marks & set(mask.nonzero()[:, 0].tolist()))
        guide.said(int(tokenizer.encode(letter)[0][0]))
    mask = guide.allowed()
    assert told == [set(), marks] and mask is not None and set(mask.nonzero()[:, 0].tolist()) == marks
    guide.said(max(marks))
    mask = guide.allowed()
    assert mask is not None and set(mask.nonzero()[:, 0].tolist()) == marks


def test_a_grammar_is_compiled_once_and_its_guides_go_their_own_ways() -> None:
    """Breaks when continuations share a place, or every request compiles anew; the oldest one goes first."""
    pytest.importorskip("llguidance")
    made = Grammars(TOKENIZERS["bytes"](), keep=2)
    first = made.regex("ab|cd")
    assert made.regex("ab|cd") is first and made.json_schema({"type": "null"}) is not first
    one, two = first(), first()
    token = {letter: int(TOKENIZERS["bytes"]().encode(letter)[0][0]) for letter in "abcd"}
    one.said(token["a"])
    for guide, letters in ((one, "b"), (two, "ac")):
        mask = guide.allowed()
        assert mask is not None and [letter for letter in "abcd" if mask[token[letter]]] == list(letters)
    made.regex("ab|cd"), made.regex("x")
    assert made.regex("ab|cd") is first
    made.regex("y"), made.regex("z")
    assert made.regex("ab|cd") is not first


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda made: made.regex("a("), r"the regular expression a\( cannot be followed: .+"),
        (lambda made: made.json_schema({"type": "nonsense"}), 'schema {"type": "nonsense"} cannot be followed'),
        (lambda made: made.json_schema({"type": "string", "format": "no-such"}), "no-such"),
    ],
)
def test_what_cannot_be_followed_is_refused_when_it_is_asked_for(
    ask: Callable[[Grammars], object], message: str
) -> None:
    """Breaks when a bad grammar becomes an error in the middle of a batch, or a text without form."""
    pytest.importorskip("llguidance")
    with pytest.raises(RecipeError, match=message):
        ask(grammars("bytes"))


def test_a_token_against_the_grammar_is_an_error() -> None:
    """Breaks when a guide that has lost its place goes on."""
    pytest.importorskip("llguidance")
    guide = grammars("bytes").regex("ab")()
    guide.said(int(TOKENIZERS["bytes"]().encode("b")[0][0]))
    with pytest.raises(RecipeError, match="cannot be followed any further"):
        guide.allowed()


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a missing extra is a traceback; choices need none."""
    monkeypatch.setitem(sys.modules, "llguidance", None)
    made = Grammars(TOKENIZERS["bytes"]())
    for ask in (lambda: made.regex("a"), made.json_object):
        with pytest.raises(MissingError, match=r'needs the package llguidance.*pip install "luthier\[guided\]"'):
            ask()
    assert any_text("bytes", made.choices(["a", "b"])(), seed=1) in ("a", "b")


def test_the_engine_bounds_each_choice_of_a_request_and_no_other_request() -> None:
    """Breaks when choices share a guide's place, a twin begins without one, or a neighbour is bounded too."""
    pytest.importorskip("llguidance")
    tokenizer = Tokenizer.of(tiny_tokenizer())
    engine = Engine(forests.language_model("llama"))
    made = Grammars(tokenizer)
    sampling = Sampling(max_new_tokens=200, temperature=1.0, stop_ids=tuple(tokenizer.stop_ids), seed=1)
    prompt = tokenizer.encode("Colour:")[0]
    free = engine.add(Request(prompt=prompt, sampling=replace(sampling, max_new_tokens=40)))
    schema = {"enum": ["red", "green", ["blue", 1], None]}
    bound = [
        engine.add(Request(prompt=prompt, sampling=sampling, choices=6, guide=guide))
        for guide in (made.json_schema(schema), made.regex("[0-9]{2}(, [0-9]{2}){0,2}"), made.choices(["yes", "no"]))
    ]
    said: dict[tuple[int, int], list[int]] = {}
    while engine.busy:
        for news in engine.step():
            said.setdefault((news.request, news.choice), []).extend(one.token for one in news.said)
            assert not news.ended or news.ended == ("length" if news.request == free else "stop")
    texts = [{tokenizer.decode(said[number, choice][:-1]) for choice in range(6)} for number in bound]
    assert all(json.loads(text) in schema["enum"] for text in texts[0]) and len(texts[0]) > 1
    assert all(re.fullmatch("[0-9]{2}(, [0-9]{2}){0,2}", text) for text in texts[1]) and len(texts[1]) > 1
    assert texts[2] == {"yes", "no"} and len(said[free, 0]) == 40


# ------------------------------------------------------------------------------------------------------------- choices


@pytest.mark.parametrize("name", TOKENIZERS)
def test_only_the_choices_come_out_and_all_of_them(name: str) -> None:
    """Breaks when two choices mix, one that begins another cannot end, or one cannot be said at all."""
    texts = ["no", "no way", "nothing", "yes", "Paris, France", "é😀", "1", "10", "100"]
    make = grammars(name).choices(texts)
    assert {any_text(name, make(), seed=seed, ending=0.0) for seed in range(150)} == set(texts)


def test_random_choices_come_out_whole() -> None:
    """Breaks for a tree with paths that part late, or meet again."""
    draw = random.Random(3)
    for seed in range(20):
        texts = ["".join(draw.choices("ab the", k=draw.randint(1, 12))) for _ in range(draw.randint(1, 8))]
        make = grammars("bytes").choices(texts)
        found = {any_text("bytes", make(), seed=10 * seed + choice, ending=0.0) for choice in range(10)}
        assert found <= set(texts)


@pytest.mark.parametrize("before", ["Answer:", "Answer:\n", "Say it"])
def test_choices_behind_a_prompt_read_as_they_are(before: str) -> None:
    """Breaks when a space is added between a prompt and a choice that goes on with it."""
    name = "metaspace"
    tokenizer = TOKENIZERS[name]()
    prompt = tokenizer.encode(before)[0]
    make = grammars(name).choices(["yes", " no"], after=prompt)
    for seed in range(10):
        guide = make()
        chooser = Chooser(Sampling(temperature=1.0, seed=seed), prompt, guide=guide)
        scores = torch.zeros(1, tokenizer.vocabulary_size)
        while not chooser.said or chooser.said[-1] not in tokenizer.stop_ids:
            choose([chooser], scores)
        whole = tokenizer.decode([*prompt.tolist(), *chooser.said[:-1]])
        assert whole.removeprefix(tokenizer.decode(prompt)) in ("yes", " no")


@pytest.mark.parametrize("texts", [[], ["a", ""]])
def test_no_choice_and_an_empty_one_are_refused(texts: list[str]) -> None:
    """Breaks when a text may end before it begins."""
    with pytest.raises(RecipeError, match="one or more texts, none of them empty"):
        grammars("bytes").choices(texts)


def test_a_choice_that_is_left_is_an_error() -> None:
    """Breaks when a guide that has lost its place goes on."""
    guide = grammars("bytes").choices(["ab"])()
    guide.said(max(TOKENIZERS["bytes"]().stop_ids))
    with pytest.raises(RecipeError, match="where no choice goes on with it"):
        guide.allowed()


def test_a_tokenizer_without_an_end_cannot_bound_a_text() -> None:
    """Breaks when a grammar has nothing to say after its end."""
    with pytest.raises(RecipeError, match="names none with which a text ends"):
        Grammars(build("bytes", eos=None))
