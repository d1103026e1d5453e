"""Chat templates: the text that transformers writes, inside limits; and proofs over a collection where there is one."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from luthier.core.errors import MissingError, RecipeError, StorageError, TemplateError, UnsafeArtifactError
from luthier.data.checks import check_rendered
from luthier.data.conversation import Message
from luthier.data.rendering.causal import CausalRenderer
from luthier.data.rendering.process import RenderProcess
from luthier.data.rendering.template import SHIPPED, Template, Wanted, choose
from luthier.data.tokenizer import Tokenizer

COLLECTION = Path(os.environ.get("LUTHIER_TEMPLATES", Path(__file__).parents[3] / "shared" / "chat_templates"))
FILES = sorted(COLLECTION.glob("*.jinja")) if COLLECTION.is_dir() else []

TALKS = {
    "one turn": [("user", "What is it?"), ("assistant", "It is Paris.")],
    "turns": [("user", "Hi"), ("assistant", "Hello!"), ("user", " and  now é "), ("assistant", "  Two\n\nlines </b> ")],
    "system": [("system", "Be brief."), ("user", "Hi"), ("assistant", "The dog"), ("user", "x"), ("assistant", "end")],
}


def squeezed(source: str) -> str:
    return source.replace("    ", "").replace("\n", "")


@pytest.mark.skipif(not FILES, reason="the collection of chat templates is not on this machine")
@pytest.mark.parametrize("squeeze", [False, True], ids=["pretty", "squeezed"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_collection_trains_exactly_the_answers(any_tokenizer, talk, path, squeeze, process):
    source = path.read_text(encoding="utf-8")
    source = squeezed(source) if squeeze else source
    template = Template(source, any_tokenizer.special_tokens, name=path.stem, process=process)
    for turns in TALKS.values():
        row = talk(*turns)
        made = CausalRenderer(any_tokenizer, template)
        views = made.render(row)
        assert [str(problem) for view in views for problem in check_rendered(view, made, row)] == []
        answers = [content for role, content in turns if role == "assistant"]
        assert trained_words(views, any_tokenizer, made.stop_ids) == [answer.strip() for answer in answers]
        raw = [{"role": role, "content": content} for role, content in turns]
        for prompt in (False, True):
            theirs = any_tokenizer.raw.apply_chat_template(
                raw, chat_template=source, tokenize=False, add_generation_prompt=prompt
            )
            assert template.render(raw, add_generation_prompt=prompt) == theirs


def trained_words(views, tokenizer: Tokenizer, stops: frozenset[int]) -> list[str]:
    found = []
    for view in views:
        places = np.flatnonzero(view.weights)
        for run in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1):
            assert int(view.tokens[run[-1]]) in stops
            before = tokenizer.decode(view.tokens[: run[0]])
            found.append(tokenizer.decode(view.tokens[: run[-1]])[len(before) :].strip())
    return found


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("adds_bos", [False, True])
def test_shipped_templates(make_tokenizer, talk, name, adds_bos):
    # Not even the marks of ChatML are needed: answers end in the end-of-text token.
    tokenizer = make_tokenizer("bytes", marks=(), adds_bos=adds_bos)
    template = choose(name, tokenizer, notice=lambda text: None)
    made = CausalRenderer(tokenizer, template)
    row = talk(*TALKS["system"])
    views = made.render(row)
    assert len(views) == 1 and [check_rendered(view, made, row) for view in views] == [[]]
    assert trained_words(views, tokenizer, tokenizer.stop_ids) == ["The dog", "end"]
    assert not any("BOS" in notice for notice in made.counts.notices)
    raw = [{"role": role, "content": content} for role, content in TALKS["system"]]
    theirs = tokenizer.raw.apply_chat_template(raw, chat_template=template.source, tokenize=False)
    assert template.render(raw) == theirs


def test_choices(make_tokenizer, tmp_path):
    heard: list[str] = []
    own = make_tokenizer("bytes", template="{{ messages[0].content }}")
    assert choose("auto", own, notice=heard.append).source == "{{ messages[0].content }}" and not heard
    assert choose("auto", make_tokenizer("bytes"), notice=heard.append).name == "instruction"
    assert "no chat template" in heard[0]
    path = tmp_path / "mine.jinja"
    path.write_text("hello")
    assert choose(str(path), own, notice=heard.append).render([]) == "hello"
    with pytest.raises(RecipeError, match="did you mean chatml"):
        choose("chatlm", own, notice=heard.append)
    with pytest.raises(StorageError):
        choose(str(tmp_path / "none.jinja"), own, notice=heard.append)


@pytest.mark.parametrize(
    "source",
    [
        "{{ {'a': '<b>é'} | tojson }}",
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
        "{% generation %}{% set a = 1 %}x{% endgeneration %}{{ a is defined }}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
        "{{ ns.n ~ 'x' ~ none }}",
        "  {% if true %}  \n x {% endif %}\n {{ bos_token }}",
        "{{ tools is none }} {{ tools | length if tools else 0 }}",
    ],
)
def test_the_text_is_what_transformers_writes(make_tokenizer, source, process):
    tokenizer = make_tokenizer("bytes")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    theirs = tokenizer.raw.apply_chat_template(messages, chat_template=source, tokenize=False)
    assert Template(source, tokenizer.special_tokens, name="test", process=process).render(messages) == theirs


def test_many_at_once_are_what_each_is_alone(process):
    """Breaks when a batch shifts, loses or mixes up its texts and errors, or remembers those of another batch."""
    source = "{{ bos }}{% for m in messages %}{{ m.content if m.content else raise_exception('empty') }}{% endfor %}"
    template = Template(source, {"bos": "<s>"}, name="test", process=process)
    wanted = [Wanted([{"content": text}] * count) for text in ("é", "\ud83d", "", "b\n") for count in range(3)]
    alone = []
    for one in wanted:
        try:
            alone.append(template.render(one.messages))
        except TemplateError as error:
            alone.append(str(error))
    assert [str(made) for made in template.render_many(wanted)] == alone
    assert "empty" in alone[7] and alone[8] == alone[7] and alone[5] == "<s>\ud83d\ud83d"
    assert template.render(wanted[1].messages) == "<s>é"
    with pytest.raises(TemplateError, match="empty"):
        template.render(wanted[7].messages)
    assert template.render_many([]) == []
    other = Template("{{ messages[0].content }}!", {}, name="other", process=process)
    assert other.render(wanted[1].messages) == "é!" and template.render(wanted[4].messages) == "<s>\ud83d"


def test_what_is_no_json_is_refused(process):
    template = Template("{{ messages | length }}", {}, name="test", process=process)
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (object(), deep, 10**5000):
        with pytest.raises(TemplateError):
            template.render([{"content": value}])
    assert template.render([{"content": [1, None, True, 1.5, {"a": ("b",)}]}]) == "1"


DOUBLING = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('not like this') }}", "not like this"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ 'a' * 99999999 }}", "characters.*template_limit"),
        ("{{ '%99999999d' % 1 }}", "characters.*template_limit"),
        ("{{ 'a'.ljust(99999999) }}", "characters.*template_limit"),
        (DOUBLING, "characters.*template_limit"),
        ("{% for i in range(99999) %}{{ 'abcdefghij' * 10 }}{% endfor %}", "characters.*template_limit"),
        ("{{ messages[7].content.text }}", "no element 7"),
        ("{{ 1 + 'a' }}", "unsupported"),
    ],
)
def test_hostile_or_broken_templates(source, words, process):
    with pytest.raises(TemplateError, match=words):
        Template(source, {}, name="test", process=process).render([])
    assert Template("well", {}, name="test", process=process).render([]) == "well"


@pytest.fixture(scope="module")
def process():
    """One process for all tests that only look at texts."""
    shared = RenderProcess()
    yield shared
    shared.close()


def test_a_template_that_does_not_compile():
    with pytest.raises(TemplateError, match="compile"):
        Template("{% if %}", {}, name="test")


def test_the_date_stands_still():
    noon = datetime(2026, 3, 4, 12, tzinfo=UTC)
    dated = Template("{{ strftime_now('%d %b %Y') }}", {}, name="test", now=noon)
    assert dated.render([]) == "04 Mar 2026"
    other = Template("{{ strftime_now('%d %b %Y') }}", {}, name="test", now=noon.replace(day=5))
    assert dated.digest != other.digest
    assert Template("x", {}, name="a", now=noon).digest == Template("x", {}, name="b").digest


def test_a_tokenizer_survives_saving_and_loading(make_tokenizer, tmp_path):
    tokenizer = make_tokenizer("bytes", template="{{ messages }}")
    tokenizer.save(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 401]}')
    back = Tokenizer.load(tmp_path)
    assert back.chat_template == "{{ messages }}" and back.adds_bos
    assert back.eos_ids == (401, 3) and back.stop_ids == {3, 401}
    assert np.array_equal(back.encode("the dog")[0], tokenizer.encode("the dog")[0])
    assert back.digest != tokenizer.digest and Tokenizer.load(tmp_path).digest == back.digest
    back.save(tmp_path / "other", chat_template="mine")
    assert Tokenizer.load(tmp_path / "other").chat_template == "mine"


def test_a_tokenizer_file_cannot_cut_texts(make_tokenizer, tmp_path):
    tokenizer = make_tokenizer("bytes")
    tokenizer.raw.backend_tokenizer.enable_truncation(4)
    tokenizer.raw.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenizer.raw.backend_tokenizer.no_truncation()
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    text = "one two three four five six seven " * 9
    back = Tokenizer.load(tmp_path)
    assert back.decode(back.encode(text)[0]) == text


def test_code_and_pickles_are_refused(tmp_path):
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"auto_map": {"AutoTokenizer": ["mine.Mine", null]}}')
    with pytest.raises(UnsafeArtifactError, match="Python code"):
        Tokenizer.load(tmp_path)
    config.unlink()
    (tmp_path / "tokenizer.pkl").write_bytes(b"")
    with pytest.raises(UnsafeArtifactError, match="pickle"):
        Tokenizer.load(tmp_path)


def test_ids_are_those_of_transformers(any_tokenizer):
    text = "<s> The dog <|im_end|>\n é 你 x"
    theirs = any_tokenizer.raw(text, add_special_tokens=False)
    ids, spans = any_tokenizer.encode(text)
    assert ids.tolist() == theirs["input_ids"] and len(spans) == len(ids)
    assert any_tokenizer.reads_as(ids, text) and not any_tokenizer.reads_as(ids, text + "y")
    words = "".join(any_tokenizer.token_text(int(token)) for token in any_tokenizer.encode("The dog")[0])
    assert words.strip() == "The dog"


def test_prompts_are_what_inference_feeds(any_tokenizer, talk):
    source = "{{ bos_token }}{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"
    made = CausalRenderer(any_tokenizer, Template(source, any_tokenizer.special_tokens, name="test"))
    theirs = any_tokenizer.raw.apply_chat_template([{"role": "user", "content": "hi"}], chat_template=source)
    assert made.prompt_ids([Message("user", "hi")]).tolist() == theirs["input_ids"]


def test_nothing_to_load(tmp_path, monkeypatch):
    with pytest.raises(MissingError):
        Tokenizer.load(tmp_path / "nowhere")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MissingError):
        Tokenizer.load("nobody/nothing")
