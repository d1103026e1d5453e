"""What the renderer trains is the answers and their stop tokens, or it says why not."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.core.errors import DataError, RecipeError, TemplateError
from luthier.data.checks import check_rendered
from luthier.data.conversation import Conversation, Message, Preference, Row, Text, ToolCall
from luthier.data.rendering.causal import CausalRenderer
from luthier.data.rendering.process import RenderProcess
from luthier.data.rendering.rendered import TOKEN_ROLES, Rendered
from luthier.data.rendering.template import Template
from luthier.data.tokenizer import Tokenizer

HEADERS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = HEADERS + PROMPT

# Templates of our own, each with one habit that is found in the wild.
DROPS_HISTORY = (
    "{% for m in messages %}{% if loop.index0 >= messages | length - 2 or add_generation_prompt and loop.last %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" + PROMPT
)
STRIPS_REASONING = (
    "{% for m in messages %}{% set said = m.content %}"
    "{% if m.role == 'assistant' and not loop.last %}{% set said = said.split('</think>')[-1] %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ said }}<|im_end|>\n{% endfor %}" + PROMPT
)
TRAILING_SPACE = (
    "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
LEADING_SPACE = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
BOS_EACH_TURN = LEADING_SPACE.replace("[INST]", "{{ bos_token }}[INST]")
PRETTY = (
    "\n{% for m in messages %}\n    {{ '<|user|>' if m.role == 'user' else '<|assistant|>' }}\n"
    "    {{ m.content + eos_token }}\n{% endfor %}\n\n"
    "{% if add_generation_prompt %}\n    {{ '<|assistant|>' }}\n{% endif %}"
)
FORCED_THOUGHT = HEADERS + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
ALTERNATES = (
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% if not rest %}{{ raise_exception('nobody has asked anything') }}{% endif %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant take turns') }}{% endif %}"
    "<|user|>{{ (first if loop.first else '') + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|user|>{% endif %}"
)
MERGES_RESULTS = (
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user\n{% endif %}"
    "({{ m.content }})"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<|system|>{{ call.function | tojson }}<|end|>{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}" + PROMPT
)
SHOUTS = CHATML.replace("m.content", "(m.content | upper if m.role == 'assistant' else m.content)")

HI = [("user", "What is it?"), ("assistant", "It is Paris.")]
LONGER = [*HI, ("user", "and now?"), ("assistant", "The end é 你好.")]


def renderer(
    tokenizer: Tokenizer, source: str, *, process: RenderProcess | None = None, **knobs: object
) -> CausalRenderer:
    template = Template(source, tokenizer.special_tokens, name="test", process=process)
    return CausalRenderer(tokenizer, template, **knobs)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def process() -> Iterator[RenderProcess]:
    """One process for all examples of a property."""
    made = RenderProcess()
    yield made
    made.close()


def said(views: list[Rendered], tokenizer: Tokenizer) -> list[str]:
    """The trained runs of all views, read back from their ids alone."""
    runs = []
    for view in views:
        places = np.flatnonzero(view.weights)
        for run in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1):
            before = tokenizer.decode(view.tokens[: run[0]])
            read = tokenizer.decode(view.tokens[: run[-1] + 1])[len(before) :]
            wanted = view.text[view.spans[run[0], 0] : view.spans[run[-1], 1]]
            # The one liberty: old tokenizers add a space behind a control token.
            behind_mark = run[0] > 0 and int(view.tokens[run[0] - 1]) in tokenizer.special_ids
            runs.append(wanted if tokenizer.prefix_space and behind_mark and read == " " + wanted else read)
    return runs


def sound(made: CausalRenderer, row: Row) -> list[Rendered]:
    views = made.render(row)
    assert [str(problem) for view in views for problem in check_rendered(view, made, row)] == []
    return views


@pytest.mark.parametrize(
    ("source", "turns", "views", "answers"),
    [
        (CHATML, LONGER, 1, ["It is Paris.<|im_end|>", "The end é 你好.<|im_end|>"]),
        (DROPS_HISTORY, LONGER, 2, ["It is Paris.<|im_end|>", "The end é 你好.<|im_end|>"]),
        (
            STRIPS_REASONING,
            [("user", "q"), ("assistant", "<think>a</think>b"), ("user", "r"), ("assistant", "<think>c</think>d")],
            2,
            ["<think>a</think>b<|im_end|>", "<think>c</think>d<|im_end|>"],
        ),
        (LEADING_SPACE, LONGER, 1, [" It is Paris. </s>", " The end é 你好. </s>"]),
        (PRETTY, LONGER, 2, ["It is Paris.</s>", "The end é 你好.</s>"]),
        (FORCED_THOUGHT, HI, 1, ["It is Paris.<|im_end|>"]),
        (ALTERNATES, [("system", "Be brief."), *LONGER], 1, ["It is Paris.</s>", "The end é 你好.</s>"]),
        ("{{ bos_token }}" + CHATML, LONGER, 1, ["It is Paris.<|im_end|>", "The end é 你好.<|im_end|>"]),
        ("{{ bos_token + bos_token }}" + CHATML, HI, 1, ["It is Paris.<|im_end|>"]),
        (BOS_EACH_TURN, LONGER, 1, [" It is Paris. </s>", " The end é 你好. </s>"]),
    ],
)
def test_habits(any_tokenizer, talk, source, turns, views, answers):
    made = renderer(any_tokenizer, source)
    found = sound(made, talk(*turns))
    assert len(found) == views
    assert said(found, any_tokenizer) == answers
    for view in found:
        assert view.tokens[0] == any_tokenizer.bos_id and view.tokens[1] != any_tokenizer.bos_id


def test_a_straddling_token_splits_views(make_tokenizer, talk):
    tokenizer = make_tokenizer("bytes")
    made = renderer(tokenizer, TRAILING_SPACE)
    row = talk(("user", "hi"), ("assistant", "the dog"), ("user", "more"), ("assistant", "the fox"))
    found = sound(made, row)
    assert said(found, tokenizer) == ["the dog</s>", "the fox</s>"]
    assert len(found) == 2
    whole = tokenizer.encode(found[-1].text)[0]
    assert not np.array_equal(found[-1].tokens[1:], whole[: len(found[-1].tokens) - 1]), "nothing straddles here"
    # What stands before each answer is what inference feeds.
    messages = row.content.messages
    for view, count in zip(found, (1, 3), strict=True):
        prompt = made.prompt_ids(messages[:count])
        assert np.array_equal(view.tokens[: len(prompt)], prompt)
        assert view.weights[len(prompt)] == 1 and not view.weights[: len(prompt)].any()


@pytest.mark.parametrize("kind", ["metaspace", "legacy"])
def test_trailing_space_with_added_spaces(make_tokenizer, talk, kind):
    tokenizer = make_tokenizer(kind)
    found = sound(renderer(tokenizer, TRAILING_SPACE), talk(("user", "hi"), ("assistant", "the dog")))
    assert said(found, tokenizer) == ["the dog</s>"]


@pytest.mark.parametrize(
    ("source", "turns", "words"),
    [
        (HEADERS, HI, "not when it is asked"),
        (CHATML.replace("<|im_end|>", "[END]"), HI, "'[END]"),
        (CHATML.replace("<|im_end|>\n", ""), HI, "ends in nothing"),
        (CHATML.replace("m.content", "m.role"), HI, "does not show it"),
        (SHOUTS.replace("<|im_start|>assistant\n{% endif", "<|im_start|>assistant \n{% endif"), HI, "changes its text"),
        (ALTERNATES, [HI[0], HI[0]], "user and assistant take turns"),
        (ALTERNATES, [HI[1]], "user and assistant take turns"),
        (FORCED_THOUGHT.replace("m.content", "m.content.split('k>')[-1]"), [HI[0], ("assistant", "<think>a</think>b")],
         "changes its text"),
    ],
)  # fmt: skip
def test_refusals(any_tokenizer, talk, source, turns, words):
    with pytest.raises(TemplateError) as caught:
        renderer(any_tokenizer, source).render(talk(*turns, number=6))
    assert words in str(caught.value)
    assert caught.value.where == "rows.jsonl:7:1"


def test_marks_that_the_tokenizer_lacks_are_refused(make_tokenizer, talk):
    bare = make_tokenizer("bytes", marks=(), bos=None)
    with pytest.raises(TemplateError, match="no single control token"):
        renderer(bare, CHATML).render(talk(*HI))


def test_an_answer_that_holds_its_stop_token_is_refused(any_tokenizer, talk):
    with pytest.raises(DataError, match="generation stops"):
        renderer(any_tokenizer, CHATML).render(talk(HI[0], ("assistant", "a <|im_end|> b")))


def test_a_changed_answer_is_counted(any_tokenizer, talk):
    made = renderer(any_tokenizer, SHOUTS)
    assert said(sound(made, talk(*HI)), any_tokenizer) == ["IT IS PARIS.<|im_end|>"]
    assert any("changes the text" in notice for notice in made.counts.notices)


def test_stop_tokens_reach_generation(make_tokenizer, talk):
    tokenizer = make_tokenizer("bytes")
    made = renderer(tokenizer, CHATML)
    assert made.stop_ids == {tokenizer.eos_id}
    made.render(talk(*HI))
    assert made.stop_ids == {tokenizer.eos_id, tokenizer.raw.convert_tokens_to_ids("<|im_end|>")}


def test_weights_and_train_on(make_tokenizer, talk):
    tokenizer = make_tokenizer("bytes")
    half = talk(HI[0], Message("assistant", "one", weight=0.5), HI[0], Message("assistant", "two", weight=0.0), *HI)
    (view,) = sound(renderer(tokenizer, CHATML), half)
    assert said([view], tokenizer) == ["one<|im_end|>", "It is Paris.<|im_end|>"]
    assert set(view.weights[view.weights > 0]) == {0.5, 1.0}
    last = sound(renderer(tokenizer, CHATML, train_on="last"), talk(*LONGER))
    assert said(last, tokenizer) == ["The end é 你好.<|im_end|>"]
    (everything,) = sound(renderer(tokenizer, CHATML, train_on="all"), half)
    assert everything.weights[0] == 0
    words = "".join(said([everything], tokenizer))
    assert "two" not in words and "What is it?" in words


def test_roles_follow_the_messages(make_tokenizer, talk):
    tokenizer = make_tokenizer("bytes")
    (view,) = sound(renderer(tokenizer, CHATML), talk(("system", "Be brief."), *LONGER))
    words = {
        role: "".join(view.text[slice(*view.spans[place])] for place in np.flatnonzero(view.roles == index))
        for index, role in enumerate(TOKEN_ROLES)
    }
    assert words["system"] == "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert "What is it?" in words["user"] and "Paris" not in words["user"]
    assert words["assistant"].count("<|im_start|>assistant\n") == 2
    assert view.roles[0] == TOKEN_ROLES.index("template")


def test_tools(make_tokenizer, talk):
    tokenizer = make_tokenizer("bytes")
    call = Message("assistant", "", tool_calls=(ToolCall("add", {"a": 1}),))
    results = [("tool", "2"), ("tool", "4"), ("assistant", "2 and 4")]
    row = talk(("user", "1+1, 2+2"), call, *results, tools=({"name": "add"},))
    knows = sound(renderer(tokenizer, MERGES_RESULTS), row)
    assert said(knows, tokenizer) == [
        '<|system|>{"name": "add", "arguments": {"a": 1}}<|end|><|im_end|>', "2 and 4<|im_end|>",
    ]  # fmt: skip
    plain = renderer(tokenizer, CHATML)
    found = sound(plain, row)
    assert said(found, tokenizer) == ['{"name": "add", "arguments": {"a": 1}}<|im_end|>', "2 and 4<|im_end|>"]
    assert "<|im_start|>user\n2\n4<|im_end|>" in found[-1].text
    notices = " ".join(plain.counts.notices)
    assert "tool calls" in notices and "tool results" in notices and "tools on offer" in notices


def test_over_length(make_tokenizer, talk):
    tokenizer = make_tokenizer("bytes")
    row = talk(("user", "One two three four five six seven eight nine ten"), ("assistant", "the dog"))
    full = len(renderer(tokenizer, CHATML).render(row)[0].tokens)
    with pytest.raises(DataError, match=f"{full} tokens") as caught:
        renderer(tokenizer, CHATML, max_tokens=full - 1).render(row)
    assert caught.value.where == row.where
    dropping = renderer(tokenizer, CHATML, max_tokens=full - 1, over_length="drop")
    assert dropping.render(row) == [] and dropping.counts.dropped == 1
    cutting = renderer(tokenizer, CHATML, max_tokens=16, over_length="truncate")
    (view,) = sound(cutting, row)
    assert len(view.tokens) == 16 and view.tokens[0] == tokenizer.bos_id
    assert said([view], tokenizer) == ["the dog<|im_end|>"] and cutting.counts.truncated == 1
    long = talk(("user", "hi"), ("assistant", SENTENCE))
    assert cutting.render(long) == [] and cutting.counts.answers_too_long == 1


@pytest.mark.parametrize("white", ["", "\n", "\n  \n "])
def test_white_space_before_bos_is_cut_away_with_the_beginning(make_tokenizer, talk, white):
    tokenizer = make_tokenizer("bytes")
    words = "One two three four five six seven eight nine ten"
    cutting = renderer(tokenizer, white + "{{ bos_token }}" + CHATML, max_tokens=24, over_length="truncate")
    (view,) = sound(cutting, talk(("user", words), ("assistant", "the dog")))
    assert view.tokens[0] == tokenizer.bos_id and tokenizer.bos_id not in view.tokens[1:] and len(view.tokens) <= 24
    assert said([view], tokenizer) == ["the dog<|im_end|>"]
    short = sound(cutting, talk(("user", "a"), ("assistant", "b")))[0]
    assert tokenizer.decode(short.tokens).startswith(white + "<s>")
    answers = tuple((Message("assistant", said),) for said in ("the dog", "b"))
    pair = Preference(Conversation((Message("user", words),)), answers)
    (view,) = sound(cutting, Row(0, "rows.jsonl:1:1", pair))
    assert view.tokens[0] == tokenizer.bos_id and tokenizer.bos_id not in view.tokens[1:]


SENTENCE = "How vexingly quick daft zebras jump, é 你好 👋🏽! " * 3


@pytest.mark.parametrize("limit", [None, 16, 19, 64])
def test_texts_are_trained_once(any_tokenizer, limit):
    made = renderer(any_tokenizer, CHATML, max_tokens=limit)
    row = Row(0, "book.txt:1:1", Text(SENTENCE))
    views = sound(made, row)
    assert limit is None or max(len(view.tokens) for view in views) <= limit
    trained = np.concatenate([view.tokens[view.weights > 0] for view in views])
    assert np.array_equal(trained, np.append(any_tokenizer.encode(SENTENCE)[0], any_tokenizer.eos_id))
    assert made.counts.trained_tokens == len(trained)


def test_texts_without_bos(make_tokenizer):
    tokenizer = make_tokenizer("bytes", adds_bos=False)
    views = sound(renderer(tokenizer, CHATML, max_tokens=17), Row(0, "book.txt:1:1", Text(SENTENCE)))
    trained = np.concatenate([view.tokens[view.weights > 0] for view in views])
    assert np.array_equal(trained, np.append(tokenizer.encode(SENTENCE)[0], tokenizer.eos_id)[1:])


def test_knobs_are_checked(make_tokenizer):
    for knobs in ({"train_on": "some"}, {"over_length": "cut"}, {"max_tokens": 3}):
        with pytest.raises(RecipeError):
            renderer(make_tokenizer("bytes"), CHATML, **knobs)


WORDS = st.text(
    st.one_of(st.characters(codec="utf-8", exclude_characters="<>▁"), st.sampled_from(" \n\té你👋🏽")), max_size=30
)
ASKED = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3)
SOURCES = st.sampled_from([CHATML, TRAILING_SPACE, LEADING_SPACE, PRETTY, DROPS_HISTORY, FORCED_THOUGHT])
KINDS = st.sampled_from(["bytes", "metaspace", "legacy"])


@settings(max_examples=150, deadline=None)
@given(asked=ASKED, source=SOURCES, kind=KINDS)
def test_trained_text_is_the_answers(make_tokenizer, process, asked, source, kind):
    tokenizer = make_tokenizer(kind)
    turns = [(Message("user", question), Message("assistant", answer)) for question, answer in asked]
    row = Row(0, "rows.jsonl:1:1", Conversation(tuple(message for turn in turns for message in turn)))
    made = renderer(tokenizer, source, process=process)
    views = made.render(row)
    assert [str(problem) for view in views for problem in check_rendered(view, made, row)] == []
    stop = "</s>" if source in (TRAILING_SPACE, LEADING_SPACE, PRETTY) else "<|im_end|>"
    before, after = (" ", " ") if source is LEADING_SPACE else ("", "")
    assert said(views, tokenizer) == [before + answer + after + stop for _, answer in asked]


@pytest.mark.parametrize("source", [CHATML, STRIPS_REASONING, TRAILING_SPACE, BOS_EACH_TURN])
def test_what_is_made_ahead_is_what_is_made_in_its_turn(any_tokenizer, talk, process, source):
    rows = [
        talk(("user", f"one {count}"), ("assistant", "two" * count), ("user", "é"), ("assistant", "b"), number=count)
        for count in range(1, 4)
    ] + [Row(4, "rows.jsonl:5:1", Text("one two\n" * 5))]
    made = []
    for ahead in (True, False):
        template = Template(source, any_tokenizer.special_tokens, name="t", process=process)
        renderer = CausalRenderer(any_tokenizer, template)
        staged = [renderer.stage(row) for row in rows]
        if ahead:
            renderer.foresee(staged)
            renderer.encode_ahead(staged)
        views = [view for one in staged for view in renderer.finish(one)]
        made.append(([_plain(view) for view in views], renderer.counts))
    assert made[0] == made[1] and len(made[0][0]) >= len(rows)


def _plain(view: Rendered) -> tuple[object, ...]:
    arrays = (view.tokens, view.weights, view.roles, view.spans)
    return view.row, view.text, *(array.tolist() for array in arrays)
