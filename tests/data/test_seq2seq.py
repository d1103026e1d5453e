"""Rows for an encoder-decoder: the source and the targets have the tokens that transformers gives each of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from luthier.core.errors import DataError, RecipeError
from luthier.data.checks import check_rendered
from luthier.data.conversation import Choices, Conversation, Labelled, Message, Row, Text, ToolCall
from luthier.data.prepare import Reading, make_renderer
from luthier.data.rendering.rendered import TOKEN_ROLES, Rendered
from luthier.data.rendering.renderer import Renderer
from tests.data.kinds import bert, roberta, row, t5, zoo

START = 0
TALK = Conversation(
    (
        Message("system", "Be brief."),
        Message("user", "What is the capital of France?"),
        Message("assistant", "Paris"),
        Message("user", "Is it large?"),
        Message("assistant", "Yes, it is large."),
    )
)
SOURCE = "Be brief.\n\nWhat is the capital of France?\n\nParis\n\nIs it large?"


def renderer(**knobs: Any) -> Renderer:
    return make_renderer(t5(), Reading(kind="seq2seq", start_id=START, **knobs))[0]


def sound(made: Renderer, one: Row) -> list[Rendered]:
    views = made.render(one)
    assert [str(problem) for view in views for problem in check_rendered(view, made, one)] == []
    return views


def roles(view: Rendered) -> list[str]:
    return [TOKEN_ROLES[role] for role in view.roles]


def ids(text: str) -> list[int]:
    return list(zoo("t5")(text)["input_ids"])


def test_a_conversation_is_a_source_and_its_last_answer() -> None:
    made = renderer()
    (view,) = sound(made, row(TALK))
    source, target = ids(SOURCE), ids("Yes, it is large.")
    assert source[-1] == target[-1] == 1
    assert view.tokens.tolist() == [*source, START, *target]
    assert view.weights.tolist() == [0.0] * (len(source) + 1) + [1.0] * len(target)
    assert roles(view)[-len(target) - 2 :] == ["template", "template", *["assistant"] * len(target)]
    starts = view.spans[: len(source) - 1, 0]
    assert roles(view)[: len(source) - 1] == ["system" if start < 11 else "user" for start in starts]
    assert made.prompt_ids(TALK.messages[:-1]).tolist() == source
    assert made.counts.notices == {
        "an earlier answer of a conversation is read, not trained: an encoder-decoder says the last": 1
    }
    assert (made.stop_ids, made.counts.trained_tokens) == (frozenset({1}), len(target))


def test_spans_name_the_text_of_source_and_target() -> None:
    (view,) = renderer().render(row(TALK))
    said = np.array(roles(view)) == "assistant"
    start, stop = view.spans[said][0, 0], view.spans[said][-1, 1]
    assert view.text[start:stop] == "Yes, it is large."
    assert view.text[: view.spans[~said][-2, 1]] == SOURCE


def test_weights_of_the_answer_and_what_follows_it() -> None:
    last = Message("assistant", "Yes", 0.5)
    made = renderer()
    (view,) = sound(made, row(Conversation((Message("user", "Is it?"), last, Message("user", "Good.")))))
    assert set(view.weights.tolist()) == {0.0, 0.5}
    assert view.tokens.tolist() == [*ids("Is it?"), START, *ids("Yes")]
    assert made.counts.notices == {"what follows the last answer of a conversation is not read": 1}


def test_the_name_of_a_class_is_a_target() -> None:
    (view,) = sound(renderer(), row(Labelled("A film", "good", "the end")))
    assert view.tokens.tolist() == [*ids("A film\nthe end"), START, *ids("good")] and view.labels is None
    assert list(dict.fromkeys(roles(view))) == ["user", "pair", "template", "assistant"]


def test_every_answer_of_a_choice_is_a_target() -> None:
    (view,) = sound(renderer(), row(Choices("What is it?", ("a dog", "a fox", "Paris"), 1)))
    parts = [ids("What is it?"), *([START, *ids(answer)] for answer in ("a dog", "a fox", "Paris"))]
    assert view.tokens.tolist() == [token for part in parts for token in part]
    names = ["wrong", "assistant", "wrong"]
    wanted = [["user"] * (len(parts[0]) - 1) + ["template"]]
    wanted += [["template", *[name] * (len(part) - 1)] for name, part in zip(names, parts[1:], strict=True)]
    assert roles(view) == [name for part in wanted for name in part]
    said = np.isin(roles(view), ["wrong", "assistant"])
    assert np.array_equal(view.weights, said.astype(np.float32))


def test_the_end_of_the_source_is_cut_and_nothing_else() -> None:
    made = renderer(max_tokens=16, over_length="truncate")
    (view,) = sound(made, row(TALK))
    assert view.tokens.tolist() == [*ids(SOURCE)[:15], 1, START, *ids("Yes, it is large.")]
    assert made.counts.truncated == 1
    long = Conversation((Message("user", "a"), Message("assistant", "the dog " * 12)))
    assert made.render(row(long)) == [] and made.counts.answers_too_long == 1
    made = renderer(max_tokens=16, over_length="drop")
    assert made.render(row(TALK)) == [] and made.render(row(long)) == [] and made.counts.dropped == 2
    with pytest.raises(DataError, match=r"rows\.jsonl:1:1: what is read has \d+ tokens; at most 16"):
        renderer(max_tokens=16).render(row(TALK))
    with pytest.raises(DataError, match=r"the answer has \d+ tokens; at most 16"):
        renderer(max_tokens=16).render(row(long))


def test_a_target_of_bart_keeps_its_beginning() -> None:
    made, _ = make_renderer(roberta(), Reading(kind="seq2seq", start_id=2))
    (view,) = sound(made, row(Labelled("A film", "good")))
    raw = zoo("roberta")
    assert view.tokens.tolist() == [*raw("A film")["input_ids"], 2, *raw("good")["input_ids"]]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (Text("a"), "read as text, which an encoder-decoder cannot"),
        (Conversation((Message("assistant", "a"),)), "nothing is said before the answer"),
        (Conversation((Message("user", "a"), Message("assistant", "", None, (ToolCall("f", {}),)))), "calls a tool"),
        (Conversation((Message("user", "a"), Message("assistant", "b")), ({"name": "f"},)), "uses tools"),
        (Conversation((Message("user", "a"), Message("assistant", "b</s>c"))), "'</s>', at which generation stops"),
    ],
)
def test_what_cannot_be_read_is_named(content: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        renderer().render(row(content))


def test_recipes_that_make_no_sense() -> None:
    with pytest.raises(RecipeError, match="without start_id"):
        make_renderer(t5(), Reading(kind="seq2seq"))
    with pytest.raises(RecipeError, match="starts with token 9999"):
        make_renderer(t5(), Reading(kind="seq2seq", start_id=9999))
    with pytest.raises(RecipeError, match=r"data\.train_on is 'all'"):
        renderer(train_on="all")
    endless, _ = make_renderer(bert(), Reading(kind="seq2seq", start_id=0))
    (view,) = sound(endless, row(Labelled("a", "b")))
    assert int(view.tokens[-1]) == 102 and endless.stop_ids == {102}


def test_checks_see_broken_rows() -> None:
    made = renderer()
    one = row(Choices("What is it?", ("a dog", "a fox"), 1))
    (view,) = made.render(one)

    def broken(**changes: Any) -> set[str]:
        return {problem.invariant for problem in check_rendered(replace(view, **changes), made, one)}

    wrong, right = TOKEN_ROLES.index("wrong"), TOKEN_ROLES.index("assistant")
    assert broken(roles=np.where(view.roles == right, wrong, view.roles).astype(np.uint8)) == {"trained"}
    assert broken(weights=np.ones_like(view.weights)) == {"trained"}
    assert broken(weights=np.zeros_like(view.weights)) == {"trained"}
    assert "prompt" in broken(tokens=np.where(view.tokens == START, 5, view.tokens))
    assert "stop" in broken(tokens=np.where(view.tokens == 1, 5, view.tokens))
    talk = row(TALK)
    (view,) = made.render(talk)
    swapped = view.tokens.copy()
    swapped[[1, 2]] = swapped[[2, 1]]
    problems = {problem.invariant for problem in check_rendered(replace(view, tokens=swapped), made, talk)}
    assert problems == {"prompt", "text"}
