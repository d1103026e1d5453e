"""The little world: reproducible, true to itself, and its held-out names never shown."""

from __future__ import annotations

import itertools
import json
import random
import string
from pathlib import Path
from typing import Any

import pytest
from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from luthier.assets import world, world_text
from luthier.assets.demo_task import KEYS, demo_rows, exact_match
from luthier.assets.world import Namer, draw_order, draw_person, is_held_out, ordinal, spell_number
from luthier.assets.world_documents import Document, documents

SEEDLING = Path(world.__file__).parent / "seedling"


def some(count: int, *, seed: int = 0, held_out: bool = False) -> list[Document]:
    return list(itertools.islice(documents(seed, held_out=held_out), count))


def whole(document: Document) -> str:
    return "\n".join((document.text, *(content for _, content in document.turns)))


def test_the_same_seed_gives_the_same_documents() -> None:
    assert some(300) == some(300)
    assert some(50) != some(50, seed=1)


def test_every_kind_appears_and_chats_alternate() -> None:
    found = some(2000)
    assert len({document.kind for document in found}) == 17
    for document in found:
        assert bool(document.text) is not bool(document.turns)
        roles = [role for role, _ in document.turns if role != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(content for _, content in document.turns)
        assert "{name}" not in whole(document)


@pytest.mark.parametrize("held_out", [False, True])
def test_names_stay_on_their_side(held_out: bool) -> None:
    names = Namer(random.Random(5), held_out)
    for _ in range(200):
        words = [names.first(), names.last(), names.place(), names.scramble(), *names.person().split()]
        assert all(is_held_out(word) is held_out for word in words)


def test_the_sides_share_no_invented_word() -> None:
    shown = {word for document in some(3000) for word in whole(document).replace(",", " ").split()}
    for row in demo_rows(100, seed=0, held_out=True):
        values = json.loads(row["messages"][1]["content"])
        for word in (*values["name"].split(), values["city"]):
            assert word not in shown


def test_a_fact_holds_its_record() -> None:
    rng = random.Random(2)
    for _ in range(200):
        person = draw_person(rng, Namer(rng))
        fact = world_text.tell_much(rng, person, 3)
        for key in fact.keys:
            if key != "born":
                assert person.written[key] in fact.sentence
        question = world_text.ask(rng, fact)
        if question is not None and question[1] in person.told.values():
            assert question[1] in fact.sentence


def test_patterns_name_known_keys_and_are_many() -> None:
    rng = random.Random(0)
    draws = (draw_order, draw_person, world.draw_place, world.draw_house, world.draw_journey)
    subjects = {subject.kind: subject for subject in (draw(rng, Namer(rng)) for draw in draws)}
    for kind, patterns in world_text.PATTERNS.items():
        for pattern in patterns:
            named = {key for _, key, _, _ in string.Formatter().parse(pattern) if key}
            assert named
            assert named <= set(subjects[kind].told)
        for question, key, answer in world_text.QUESTIONS[kind]:
            assert key in subjects[kind].written
            assert question.format_map(subjects[kind].written)
            assert answer.format_map(subjects[kind].written)
    asked = sum(2 * len(questions) for questions in world_text.QUESTIONS.values())
    assert sum(map(len, world_text.PATTERNS.values())) + asked >= 150


def test_every_notation_is_different_and_none_is_json() -> None:
    rng = random.Random(1)
    order = draw_order(rng, Namer(rng))
    labels = (("name", "name"), ("city", "city"))
    written = {kind: world_text.write_record(order, labels, notation=kind) for kind in world_text.NOTATIONS}
    assert len(set(written.values())) == len(set(world_text.NOTATIONS))
    for text in written.values():
        with pytest.raises(json.JSONDecodeError):
            json.loads(text)


def test_the_demo_schema_is_not_in_the_corpus() -> None:
    for document in some(5000):
        text = whole(document)
        assert "JSON" not in text
        for key in KEYS:
            assert f'"{key}":' not in text


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "zero"), (19, "nineteen"), (42, "forty-two"), (300, "three hundred"), (721, "seven hundred and twenty-one")],
)
def test_numbers_in_words(number: int, words: str) -> None:
    assert spell_number(number) == words


def test_ordinals() -> None:
    assert [ordinal(n) for n in (1, 2, 3, 4, 11, 12, 13, 21, 22, 23, 31)] == [
        "1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "22nd", "23rd", "31st",
    ]  # fmt: skip


def test_demo_rows_are_strict_and_disjoint() -> None:
    train = demo_rows(200, seed=0, held_out=False)
    held = demo_rows(200, seed=0, held_out=True)
    assert train == demo_rows(200, seed=0, held_out=False)
    for row in train + held:
        asked, answer = row["messages"]
        assert (asked["role"], answer["role"]) == ("user", "assistant")
        values = json.loads(answer["content"])
        assert tuple(values) == KEYS
        assert values["name"] in asked["content"]
        assert values["city"] in asked["content"]
        assert exact_match(answer["content"], answer["content"])
    questions = {row["messages"][0]["content"] for row in train}
    assert not questions & {row["messages"][0]["content"] for row in held}


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        ('{"name":"A B","quantity":3,"price":1.50}', True),
        ('{"name": "A B", "quantity": 3, "price": 1.5}', True),
        ('{"name":"A C","quantity":3,"price":1.50}', False),
        ('{"quantity":3,"name":"A B","price":1.50}', False),
        ('{"name":"A B","quantity":"3","price":1.50}', False),
        ('{"name":"A B","quantity":true,"price":1.50}', False),
        ('{"name":"A B","quantity":3,"price":1.50} ', False),
        ('Here: {"name":"A B","quantity":3,"price":1.50}', False),
        ('{"name":"A B","quantity":3,"price":1.50,"price":1.50}', False),
        ('{"name":"A B","quantity":3,"price":NaN}', False),
        ('{"name":"A B","quantity":3', False),
        ("", False),
        ("[" * 100_000, False),
    ],
)
def test_exact_match(answer: str, same: bool) -> None:
    assert exact_match(answer, '{"name":"A B","quantity":3,"price":1.50}') is same


def test_the_tokenizer_writes_any_text() -> None:
    tokenizer = Tokenizer.from_file(str(SEEDLING / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 4096
    ends = [tokenizer.token_to_id(token) for token in ("<|begin|>", "<|end|>", "<|pad|>")]
    assert ends == [0, 1, 2]
    for text in (
        "To be, or not to be:\n  that is the question.",
        "été 日本 🙂\t\x00\r\n",
        "She sold 48/2 = <<48/2=24>>24",
        "",
    ):
        encoded = tokenizer.encode(text)
        assert encoded.ids[0] == 0
        assert encoded.ids.count(0) == 1
        assert tokenizer.decode(encoded.ids) == text
    assert len(tokenizer.encode("2031", add_special_tokens=False).ids) == 4


def test_a_name_is_the_same_tokens_everywhere() -> None:
    tokenizer = Tokenizer.from_file(str(SEEDLING / "tokenizer.json"))
    name = tokenizer.encode("Romintha", add_special_tokens=False).ids
    for around in ("so {} went", '"name":"{}"', "{}:", "<{}>"):
        ids = tokenizer.encode(around.format("Romintha"), add_special_tokens=False).ids
        assert any(ids[i : i + len(name)] == name for i in range(len(ids)))


@pytest.fixture(scope="module")
def template() -> Template:
    # What transformers offers to a chat template: raise_exception, and a tojson that leaves the signs as they are.
    def refuse(message: str) -> None:
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = json.dumps
    environment.globals["raise_exception"] = refuse
    return environment.from_string((SEEDLING / "chat_template.jinja").read_text(encoding="utf-8"))


TOOL_TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Rain in Velmora?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"city": "Velmora"}}}],
    },
    {"role": "tool", "content": "fog"},
    {"role": "assistant", "content": "Fog."},
    {"role": "user", "content": "Thank you."},
    {"role": "assistant", "content": "Goodbye!"},
]


@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "look"}}]])
@pytest.mark.parametrize("start", [0, 1])
def test_what_is_asked_is_a_prefix_of_what_is_answered(template: Template, tools: object, start: int) -> None:
    talk = TOOL_TALK[start:]
    for i, message in enumerate(talk):
        if message["role"] == "assistant":
            given = {"bos_token": "<|begin|>", "tools": tools}
            asked = template.render(messages=talk[:i], add_generation_prompt=True, **given)
            answered = template.render(messages=talk[: i + 1], **given)
            assert answered.startswith(asked)
            assert answered.endswith("<|end|>")
            assert answered.count("<|begin|>") == 1
            assert ("Tools:" in asked) is (tools is not None)


def test_a_tool_call_is_a_line_of_json(template: Template) -> None:
    text = template.render(messages=TOOL_TALK[:4], bos_token="<|begin|>")
    line = text.split("<|assistant|>")[1].split("<|end|>")[0]
    assert json.loads(line) == {"name": "look", "arguments": {"city": "Velmora"}}
    assert text.endswith("<|tool|>fog")


def test_an_unknown_role_is_refused(template: Template) -> None:
    with pytest.raises(ValueError, match="unknown role critic"):
        template.render(messages=[{"role": "critic", "content": "no"}], bos_token="<|begin|>")
