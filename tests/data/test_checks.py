"""Each invariant notices the damage it is there for, and sound rows have no problem."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from luthier.core.errors import DataError
from luthier.data.checks import check_rendered
from luthier.data.conversation import Row, Text
from luthier.data.rendering.causal import CausalRenderer
from luthier.data.rendering.template import Template

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = [("user", "What is it?"), ("assistant", "It is Paris."), ("user", "more"), ("assistant", "the end")]


@pytest.fixture
def case(make_tokenizer, talk):
    tokenizer = make_tokenizer("bytes")
    made = CausalRenderer(tokenizer, Template(CHATML, tokenizer.special_tokens, name="test"))
    row = talk(*TURNS, number=4)
    (view,) = made.render(row)
    return view, made, row


def problems(view, made, row):
    return {problem.invariant for problem in check_rendered(view, made, row)}


def test_a_sound_row(case):
    assert problems(*case) == set()


def without(view, keep):
    return replace(
        view, tokens=view.tokens[keep], weights=view.weights[keep], roles=view.roles[keep], spans=view.spans[keep]
    )


def test_nothing_trained(case):
    view, made, row = case
    assert problems(replace(view, weights=np.zeros_like(view.weights)), made, row) == {"trained"}
    first_only = np.zeros_like(view.weights)
    first_only[0] = 1
    assert "trained" in problems(replace(view, weights=first_only), made, row)
    spoiled = view.weights.copy()
    spoiled[-1] = np.nan
    assert "trained" in problems(replace(view, weights=spoiled), made, row)


def test_the_stop_token_is_not_trained(case):
    view, made, row = case
    stop = np.flatnonzero(view.weights)[-1]
    weights = view.weights.copy()
    weights[stop] = 0
    assert problems(replace(view, weights=weights), made, row) == {"stop"}


def test_more_than_the_stop_token_is_trained(case):
    view, made, row = case
    stop = np.flatnonzero(view.weights)[-1]
    weights = view.weights.copy()
    weights[stop + 1] = 1
    assert problems(replace(view, weights=weights), made, row) == {"stop"}


def test_generation_does_not_know_the_stop_token(case, make_tokenizer):
    view, made, row = case
    fresh = CausalRenderer(made.tokenizer, made.template)
    assert "stop" in problems(view, fresh, row)


def test_the_header_is_trained(case):
    view, made, row = case
    weights = view.weights.copy()
    weights[np.flatnonzero(weights)[0] - 1] = 1
    assert problems(replace(view, weights=weights), made, row) == {"prompt"}


def test_bos(case):
    view, made, row = case
    places = np.arange(len(view.tokens))
    assert "bos" in problems(without(view, places[1:]), made, row)
    assert "bos" in problems(without(view, np.concatenate([places[:1], places])), made, row)


def test_bos_inside_a_text(make_tokenizer, talk):
    tokenizer = make_tokenizer("bytes")
    made = CausalRenderer(tokenizer, Template(CHATML, tokenizer.special_tokens, name="test"))
    row = Row(0, "book.txt:1:1", Text("one <s> two"))
    assert problems(made.render(row)[0], made, row) == {"bos"}
    asked = talk(("user", "what does <s> mean?"), ("assistant", "struck out"))
    assert problems(made.render(asked)[0], made, asked) == {"bos"}
    assert any("control token" in notice for notice in made.counts.notices)


def test_tokens_that_say_another_text(case):
    view, made, row = case
    tokens = view.tokens.copy()
    tokens[np.flatnonzero(view.weights)[1]] = made.tokenizer.encode("Z")[0][0]
    problem = check_rendered(replace(view, tokens=tokens), made, row)[0]
    assert problem.invariant == "text" and problem.where == "rows.jsonl:5:1" and "Z" in problem.found and problem.do


def test_a_lost_token(case):
    view, made, row = case
    keep = np.delete(np.arange(len(view.tokens)), 3)
    assert {"text", "prompt"} <= problems(without(view, keep), made, row)


def test_left_cut_only_where_truncation_is_allowed(case):
    view, made, row = case
    cut = without(view, np.concatenate([[0], np.arange(6, len(view.tokens))]))
    assert "prompt" in problems(cut, made, row)
    cutting = CausalRenderer(made.tokenizer, made.template, over_length="truncate", max_tokens=40)
    cutting.render(row)
    assert problems(cut, cutting, row) == set()


def test_training_on_everything(make_tokenizer, talk):
    tokenizer = make_tokenizer("bytes")
    made = CausalRenderer(tokenizer, Template(CHATML, tokenizer.special_tokens, name="test"), train_on="all")
    row = talk(*TURNS)
    (view,) = made.render(row)
    assert problems(view, made, row) == set()
    weights = view.weights.copy()
    weights[[index for index in range(len(view.tokens)) if int(view.tokens[index]) in made.stop_ids]] = 0
    assert problems(replace(view, weights=weights), made, row) == {"stop"}


def test_a_problem_as_an_error(case):
    view, made, row = case
    (problem, *_) = check_rendered(replace(view, weights=np.zeros_like(view.weights)), made, row)
    error = problem.error()
    assert isinstance(error, DataError) and "no token is trained" in str(error) and error.where == row.where
