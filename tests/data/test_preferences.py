"""Preferences from rows to tokens: what formats mean, a prompt that is shared and proved, limits, checks, the store."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.core.errors import DataError, RecipeError, TemplateError
from luthier.data.checks import check_rendered
from luthier.data.conversation import Asked, Conversation, Judged, Meaning, Message, Preference, Row
from luthier.data.formats import detect, mapped
from luthier.data.prepare import Prepared, Reading, prepare
from luthier.data.reading.rows import SourceFile
from luthier.data.rendering.causal import CausalRenderer
from luthier.data.rendering.process import RenderProcess
from luthier.data.rendering.rendered import TOKEN_ROLES, Rendered
from luthier.data.rendering.renderer import TooLongError
from luthier.data.tokenizer import Tokenizer
from tests.data.conftest import MakeTokenizer
from tests.data.taken import take
from tests.data.test_renderer import (
    CHATML,
    DROPS_HISTORY,
    FORCED_THOUGHT,
    LEADING_SPACE,
    TRAILING_SPACE,
    renderer,
)

HI, HELLO, WHAT = Message("user", "Hi"), Message("assistant", "Hello!"), Message("assistant", "What?")
PAIR = Preference(Conversation((HI,)), ((HELLO,), (WHAT,)))
U, GOOD, BAD = ({"role": "user", "content": "Hi"}, *({"role": "assistant", "content": c} for c in ("Hello!", "What?")))
HUMAN, SAID = {"from": "human", "value": "Hi"}, "\n\nHuman: Hi\n\nAssistant:"
GPT = {"from": "gpt", "value": "Hello!"}, {"from": "gpt", "value": "What?"}


def meaning(row: dict[str, Any], wanted: Meaning) -> Any:
    return detect([row], wanted=[wanted]).format.read(row, "rows.jsonl:1:1")


# ------------------------------------------------------------------------------------------------------------ formats

SAME: list[tuple[str, dict[str, Any]]] = [
    ("preference", {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"}),
    ("preference", {"prompt": [U], "chosen": [GOOD], "rejected": [BAD]}),
    ("preference", {"prompt": "Hi", "chosen": [U, GOOD], "rejected": [U, BAD]}),
    ("preference", {"chosen": [U, GOOD], "rejected": [U, BAD]}),
    ("preference", {"question": "Hi", "chosen": GOOD, "rejected": "What?"}),
    ("preference", {"messages": [U], "chosen": GOOD, "rejected": BAD}),
    ("preference_openai", {"input": {"messages": [U]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]}),
    ("preference_sharegpt", {"conversations": [HUMAN], "chosen": GPT[0], "rejected": GPT[1]}),
    ("preference_hh", {"chosen": f"{SAID} Hello!", "rejected": f"{SAID} What?"}),
    ("preference_hh", {"prompt": SAID, "chosen": " Hello!", "rejected": " What?"}),
    ("ranking", {"prompt": "Hi", "ranked": ["Hello!", "What?"]}),
]


@pytest.mark.parametrize(("name", "row"), SAME, ids=[f"{i}-{name}" for i, (name, _) in enumerate(SAME)])
def test_all_shapes_mean_the_same_pair(name: str, row: dict[str, Any]) -> None:
    found = detect([row], wanted=["preference"])
    assert found.format.name == name
    assert found.format.read(row, "x") == PAIR
    assert set(found.format.columns(row)) == set(row)


def test_whole_conversations_share_what_is_before_their_last_answers() -> None:
    """Breaks when an earlier answer is taken for the one that was judged, or a shared turn is said twice."""
    before = [U, GOOD, {"role": "user", "content": "More"}]
    pair = meaning({"chosen": [*before, GOOD], "rejected": [*before, BAD]}, "preference")
    assert [message.content for message in pair.asked.messages] == ["Hi", "Hello!", "More"]
    assert pair.answers == ((HELLO,), (WHAT,))
    dialogue = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: More\n\nAssistant: "
    assert meaning({"chosen": f"{dialogue}Hello!", "rejected": f"{dialogue}What?"}, "preference") == pair
    # One that ends where the other goes on parts from it at the last answer of both.
    longer = meaning({"chosen": [*before, GOOD], "rejected": [U, GOOD]}, "preference")
    assert longer.asked.messages == (HI,) and len(longer.answers[0]) == 3 and longer.answers[1] == (HELLO,)


def test_scores_order_answers_and_say_by_how_much() -> None:
    """Breaks when the order of columns goes before the scores of a ranking."""
    row = {"prompt": "Hi", "answers": ["What?", "Hello!", "Yes?"], "scores": [0.5, 2, 0.5]}
    ranked = meaning(row, "preference")
    assert ranked.answers[0] == (HELLO,) and ranked.scores == (2.0, 0.5, 0.5)
    pair = {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"}
    assert meaning({**pair, "score_chosen": 8.5, "score_rejected": 3}, "preference").scores == (8.5, 3.0)
    assert meaning({**pair, "margin": 1.5}, "preference").scores == (1.5, 0.0)
    assert meaning({**pair, "margin": None}, "preference").scores is None
    plain = mapped({"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"})
    assert plain.read({**pair, "score_chosen": 1, "score_rejected": 3}, "x") == PAIR


def test_answers_that_were_judged_one_by_one() -> None:
    good = Judged(Conversation((HI,)), (HELLO,), good=True)
    turns = [{"from": "human", "value": "Hi"}, GPT[0]]
    for row in (
        {"prompt": "Hi", "completion": "Hello!", "label": True},
        {"question": "Hi", "answer": "Hello!", "good": 1},
        {"prompt": [U], "completion": [GOOD], "label": "true"},
        {"messages": [U, GOOD], "kto_tag": True},
        {"conversations": turns, "label": 1},
    ):
        assert meaning(row, "judged") == good, row
    assert meaning({"messages": [U, BAD], "label": False}, "judged") == Judged(Conversation((HI,)), (WHAT,), good=False)
    columns = mapped({"prompt": "p", "answer": "a", "good": "g"})
    assert columns.read({"p": "Hi", "a": "Hello!", "g": True}, "x") == good


def test_what_is_asked_keeps_the_other_columns_as_facts() -> None:
    """Breaks when a fact that a reward needs is dropped, or the answer of a row is shown to the model."""
    plain = Asked(Conversation((HI,)), {"answer": "4", "tests": ["a", {"b": 1}]}, "Hi")
    assert meaning({"question": "Hi", "answer": "4", "tests": ["a", {"b": 1}]}, "asked") == plain
    assert meaning({"messages": [U, {"role": "assistant", "content": "4"}], "level": 2}, "asked") == Asked(
        Conversation((HI,)), {"answer": "4", "level": 2}
    )
    whole = meaning({"prompt": "Hi", "system": "S", "answer": "4"}, "asked")
    assert whole == Asked(Conversation((Message("system", "S"), HI)), {"answer": "4"}, "Hi")
    assert mapped({"prompt": "ask"}).read({"ask": "Hi", "prompt": "no"}, "x") == Asked(
        Conversation((HI,)), {"prompt": "no"}, "Hi"
    )


BAD_ROWS: list[tuple[Meaning, dict[str, Any], str, str]] = [
    ("preference", {"prompt": "Hi", "chosen": "a", "rejected": "a"}, "rejected", "two of the answers are the same"),
    ("preference", {"prompt": "Hi", "chosen": "", "rejected": "x"}, "chosen", "the answer is empty (chosen)"),
    ("preference", {"prompt": "Hi", "chosen": "a", "rejected": None}, "rejected", "rejected is null"),
    ("preference", {"prompt": [], "chosen": "a", "rejected": "b"}, "prompt", "prompt is an empty list"),
    (
        "preference", {"prompt": "Hi", "chosen": "a", "rejected": "b", "score_chosen": 2, "score_rejected": 2},
        "score_chosen", "score_chosen is 2 and score_rejected 2, so the chosen answer is not better",
    ),
    ("preference", {"prompt": "Hi", "chosen": "a", "rejected": "b", "margin": "x"}, "margin", "margin is a string"),
    ("preference", {"prompt": "Yo", "chosen": [U, GOOD], "rejected": [U, BAD]}, "prompt", "prompt is not in them"),
    ("preference", {"chosen": [U, GOOD], "rejected": [U, GOOD]}, "rejected", "chosen and rejected are the same"),
    ("preference", {"chosen": [GOOD], "rejected": [BAD]}, "chosen", "nothing is said before the answer"),
    ("preference", {"prompt": [U, GOOD], "chosen": "a", "rejected": "b"}, "prompt", "ends with an assistant message"),
    (
        "preference", {"chosen": "\n\nHuman: a\n\nAssistant: ", "rejected": "\n\nHuman: a\n\nAssistant: b"},
        "chosen", "a turn of Assistant is empty (chosen)",
    ),
    ("preference", {"prompt": "Hi", "answers": ["a"], "scores": [1]}, "answers", "answers holds 1 answer"),
    ("preference", {"prompt": "Hi", "answers": ["a", "b"], "scores": [1]}, "scores", "2 answers, but scores 1 scores"),
    ("preference", {"prompt": "Hi", "answers": ["a", "b"], "scores": [1, 1]}, "scores", "all answers have the score 1"),
    ("preference", {"input": {"m": 1}, "preferred_output": [], "non_preferred_output": []}, "input", "an object"),
    ("judged", {"prompt": "Hi", "completion": "a", "label": 2}, "label", "label is 2; expected true"),
    ("judged", {"messages": [U], "label": True}, "messages", "nothing is said before the answer"),
]  # fmt: skip


@pytest.mark.parametrize(("wanted", "row", "at", "words"), BAD_ROWS, ids=lambda each: str(each)[:40])
def test_a_mistake_is_named_with_its_place(
    wanted: Meaning, row: dict[str, Any], at: str, words: str, tmp_path: Path
) -> None:
    line = json.dumps(row)
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{line}\n")
    (error,) = take(SourceFile(path, wanted=(wanted,))).rejects
    assert words in str(error)
    assert error.where.startswith(f"{path}:1:")
    assert line[int(error.where.rpartition(":")[2]) - 1 :].startswith(f'"{at}"')


def test_preferences_are_no_answers_to_imitate() -> None:
    with pytest.raises(DataError, match=r"objective that compares answers.*answer: chosen"):
        detect([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(DataError, match="name their prompt"):
        detect([{"ask": "a", "chosen": "b", "rejected": "c"}], wanted=["preference"])


# ---------------------------------------------------------------------------------------------------------- rendering


@pytest.fixture(scope="module")
def process() -> Iterator[RenderProcess]:
    process = RenderProcess()
    yield process
    process.close()


def row(content: Preference | Judged | Asked) -> Row:
    return Row(3, "rows.jsonl:4:1", content)


def pieces(view: Rendered) -> list[np.ndarray]:
    assert view.answers is not None
    return [view.tokens[view.answers == number] for number in range(int(view.answers.max()) + 1)]


def sound(made: CausalRenderer, content: Preference | Judged | Asked) -> Rendered:
    """The one view of a row, which keeps all promises."""
    (view,) = made.render(row(content))
    assert check_rendered(view, made, row(content)) == []
    return view


@pytest.mark.parametrize("source", [CHATML, LEADING_SPACE, TRAILING_SPACE, DROPS_HISTORY, FORCED_THOUGHT])
def test_each_answer_stands_behind_what_inference_feeds(
    any_tokenizer: Tokenizer, source: str, process: RenderProcess
) -> None:
    """Breaks when a token straddles the end of a prompt, or an answer is tokenised otherwise than it would be alone."""
    made = renderer(any_tokenizer, source, process=process)
    answers = ((Message("assistant", "Paris, of course"),), (Message("assistant", "\nI do not know"),), (HELLO,))
    asked = Conversation((Message("user", "What is the capital of France?"),))
    view = sound(made, Preference(asked, answers))
    prompt, *found = pieces(view)
    assert np.array_equal(prompt, made.prompt_ids(asked.messages))
    for own, answer in zip(found, answers, strict=True):
        alone = Row(0, "x", Conversation((*asked.messages, *answer)))
        (whole,) = made.render(alone)
        last = int(np.flatnonzero(whole.weights)[-1])
        assert np.array_equal(np.concatenate([prompt, own]), whole.tokens[: last + 1])
        assert int(own[-1]) in made.stop_ids
    assert not view.weights[: len(prompt)].any() and view.weights[len(prompt) :].all()
    names = [TOKEN_ROLES[role] for role in view.roles[len(prompt) :].tolist()]
    assert set(names[: len(found[0])]) <= {"assistant", "template"} and "wrong" in names[len(found[0]) :]
    assert "assistant" not in names[len(found[0]) :]


def test_an_answer_of_several_messages_trains_the_assistant_only(
    make_tokenizer: MakeTokenizer, process: RenderProcess
) -> None:
    made = renderer(make_tokenizer(), CHATML, process=process)
    long = (HELLO, Message("user", "And you?"), WHAT)
    view = sound(made, Preference(Conversation((HI,)), (long, (WHAT,))))
    assert view.answers is not None
    own = view.answers == 1
    said = made.tokenizer.decode(view.tokens[own & (view.weights > 0)])
    assert said == "Hello!<|im_end|>What?<|im_end|>"
    with pytest.raises(TemplateError, match="an answer becomes 2 texts"):
        renderer(make_tokenizer(), DROPS_HISTORY, process=process).render(
            row(Preference(Conversation((HI,)), (long, (WHAT,))))
        )


def test_results_of_tools_in_the_prompt_move_no_answer(make_tokenizer: MakeTokenizer, process: RenderProcess) -> None:
    """Breaks when messages that a template merges shift which turns are trained."""
    made = renderer(make_tokenizer(), CHATML, process=process)
    call = Message("assistant", "Let me see")
    asked = Conversation((HI, call, Message("tool", "1"), Message("tool", "2")))
    view = sound(made, Preference(asked, ((HELLO,), (WHAT,))))
    assert made.counts.notices
    assert made.tokenizer.decode(view.tokens[view.weights > 0]) == "Hello!<|im_end|>What?<|im_end|>"


def test_a_judged_answer_is_good_or_bad(make_tokenizer: MakeTokenizer, process: RenderProcess) -> None:
    made = renderer(make_tokenizer(), CHATML, process=process)
    for good, name in ((True, "assistant"), (False, "wrong")):
        view = sound(made, Judged(Conversation((HI,)), (HELLO,), good))
        assert {TOKEN_ROLES[role] for role in view.roles[view.weights > 0].tolist()} == {name}


def test_a_prompt_alone_carries_no_weight(make_tokenizer: MakeTokenizer, process: RenderProcess) -> None:
    made = renderer(make_tokenizer(), CHATML, process=process, max_tokens=40, over_length="truncate")
    view = sound(made, Asked(Conversation((HI,)), {"answer": "4"}))
    assert np.array_equal(view.tokens, made.prompt_ids([HI])) and not view.weights.any()
    assert made.render(row(Asked(Conversation((Message("user", "long " * 50),)), {}))) == []
    assert made.counts.dropped == 1


@pytest.mark.parametrize("policy", ["raise", "drop", "truncate"])
def test_a_long_row_loses_the_beginning_of_its_prompt_or_is_left_out(
    policy: str, make_tokenizer: MakeTokenizer, process: RenderProcess
) -> None:
    """Breaks when an answer loses its end, prompts are cut differently, or both answers count as one length."""
    tokenizer = make_tokenizer()
    asked = Conversation((Message("user", "one two three four five " * 4),))
    content = Preference(asked, ((HELLO,), (Message("assistant", "What do you mean?"),)), (1.0, 0.0))
    whole = sound(renderer(tokenizer, CHATML, process=process), content)
    prompt, one, two = pieces(whole)
    limit = len(prompt) + max(len(one), len(two))
    assert len(sound(renderer(tokenizer, CHATML, process=process, max_tokens=limit), content).tokens) > limit
    made = renderer(tokenizer, CHATML, process=process, max_tokens=limit - 7, over_length=policy)
    if policy == "raise":
        with pytest.raises(TooLongError, match=f"the prompt with its longest answer has {limit} tokens"):
            made.render(row(content))
        return
    if policy == "drop":
        assert made.render(row(content)) == [] and made.counts.dropped == 1
        return
    view = sound(made, content)
    cut, first, second = pieces(view)
    assert made.counts.truncated == 1 and np.array_equal(first, one) and np.array_equal(second, two)
    assert cut[0] == tokenizer.bos_id and np.array_equal(cut[1:], prompt[len(prompt) - len(cut) + 1 :])
    assert len(cut) + max(len(one), len(two)) == limit - 7
    assert view.scores is not None and set(view.scores.tolist()) == {0.0, 1.0}
    short = renderer(tokenizer, CHATML, process=process, max_tokens=16, over_length="truncate")
    long = Preference(asked, ((HELLO,), (Message("assistant", "no " * 30),)))
    assert short.render(row(long)) == [] and short.counts.answers_too_long == 1


def test_answers_with_the_same_tokens_are_refused(make_tokenizer: MakeTokenizer, process: RenderProcess) -> None:
    """Breaks when a template's trimming makes two answers one, and a pair without a difference is trained."""
    trims = CHATML.replace("{{ m.content }}", "{{ m.content | trim }}")
    made = renderer(make_tokenizer(), trims, process=process)
    content = Preference(Conversation((HI,)), ((HELLO,), (Message("assistant", "Hello! "),)))
    with pytest.raises(DataError, match="answer 2 has the same tokens"):
        made.render(row(content))
    for weight in (0.5, 2.0):
        odd = Preference(Conversation((HI,)), ((replace(HELLO, weight=weight),), (WHAT,)))
        with pytest.raises(DataError, match="a weight of its own"):
            made.render(row(odd))
    everything = renderer(make_tokenizer(), CHATML, process=process, train_on="all")
    with pytest.raises(RecipeError, match="train_on is 'all'"):
        everything.render(row(PAIR))


def test_the_checks_see_what_is_broken(make_tokenizer: MakeTokenizer, process: RenderProcess) -> None:
    """Breaks when a promise about pairs is looked at nowhere."""
    made = renderer(make_tokenizer(), CHATML, process=process)
    view = sound(made, PAIR)
    assert view.answers is not None
    stop = int(np.flatnonzero(view.answers == 1)[-1])
    weights, tokens, roles = view.weights.copy(), view.tokens.copy(), view.roles.copy()
    weights[0], tokens[stop] = 1, tokens[0]
    roles[view.answers == 1] = TOKEN_ROLES.index("wrong")
    prompt = view.tokens.copy()
    prompt[2] = prompt[3]
    for broken, invariant in (
        (replace(view, weights=weights), "trained"),
        (replace(view, tokens=tokens), "stop"),
        (replace(view, roles=roles), "trained"),
        (replace(view, tokens=prompt), "prompt"),
        (replace(view, answers=view.answers[::-1].copy()), "trained"),
        (replace(view, answers=None), "trained"),
        (replace(view, text=view.text.replace("Hello", "Hallo")), "text"),
    ):
        found = check_rendered(broken, made, row(PAIR))
        assert invariant in {problem.invariant for problem in found}


# -------------------------------------------------------------------------------------------------------------- store


def test_a_store_gives_back_what_was_rendered(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    """Breaks when answers or scores are not stored, or those of rows without are invented."""
    rows = [
        {"prompt": f"Hi {number}", "chosen": "Hello!", "rejected": "What?", **({"margin": 2.0} if number == 1 else {})}
        for number in range(3)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    tokenizer = make_tokenizer(template=CHATML)

    def prepared() -> Prepared:
        return prepare(path, tokenizer, Reading(wanted=("preference",)), cache=tmp_path / "cache")

    for found in (prepared(), prepared()):
        views = [found.store[index] for index in range(3)]
        assert [None if v.answers is None else int(v.answers.max()) for v in views] == [2, 2, 2]
        assert views[0].scores is None and views[2].scores is None
        marks = views[1].scores
        assert marks is not None and marks.max() == 2.0 and views[1].labels is None
        assert found.counts()["rendered"]["trained_tokens"] == sum(view.trained_count for view in views)
        assert found.report.answers.trained == 6
