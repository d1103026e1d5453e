"""Chat templates in Ollama's language: those of the field's families, derived and compared; others refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from luthier.core.errors import TemplateError
from luthier.data.rendering.go_chat import CHECKS, GoChat, go_template_for, require_equal
from luthier.data.rendering.go_template import ollama_values, render
from luthier.data.rendering.process import RenderProcess
from luthier.data.rendering.template import Template
from luthier.data.tokenizer import Tokenizer
from luthier.model.load import resolve_source
from tests.data.test_templates import FILES, squeezed
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

BOS, EOS = "<|begin|>", "<|end|>"
ALTERNATE = ("{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
             "{{ raise_exception('roles must alternate') }}{% endif %}")  # fmt: skip
CHATML = (
    "{{ bos_token }}{% if messages[0].role != 'system' %}<|im_start|>system\nYou are kind.<|im_end|>\n{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = (
    "{% for message in messages %}{% set text = '<|head|>' + message.role + '<|tail|>\n\n' + message.content | trim + "
    "'<|eot|>' %}{% if loop.first %}{% set text = bos_token + text %}{% endif %}{{ text }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|tail|>\n\n' }}{% endif %}"
)
TURNS = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for message in messages %}" + ALTERNATE + "<start_of_turn>{{ 'model' if message.role == 'assistant' else "
    "message.role }}\n{{ message.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}"
    "{{ '<start_of_turn>model\n' }}{% endif %}"
)
BRACKETS = (
    "{% if messages[0].role == 'system' %}{% set first = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}" + ALTERNATE + "{% if message.role == 'user' %}{{ bos_token + '[INST] ' + (first if "
    "loop.first else '') + message.content + ' [/INST]' }}{% else %}{{ ' ' + message.content + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
LAST_USER = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}[INST]{% if loop.last and "
    "messages[0].role == 'system' %}{{ messages[0].content }} {% endif %}{{ message.content }}[/INST]"
    "{% elif message.role == 'assistant' %}{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
NUMBERED = "{{ bos_token }}{% for message in messages %}{{ loop.index }}. {{ message.content }}\n{% endfor %}"
TWICE = "{{ bos_token }}{% for message in messages %}{{ message.content }} {{ message.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def process() -> Iterator[RenderProcess]:
    made = RenderProcess()
    yield made
    made.close()


@pytest.fixture(scope="module")
def seedling() -> Tokenizer:
    return Tokenizer.load(resolve_source("seedling"))


def made_of(source: str, tokenizer: Tokenizer, process: RenderProcess) -> tuple[GoChat, Template]:
    template = Template(source, tokenizer.special_tokens, name="here", process=process)
    return go_template_for(template, tokenizer), template


def talk(*contents: str, roles: Sequence[str] = ()) -> list[dict[str, str]]:
    roles = roles or [("user", "assistant")[number % 2] for number in range(len(contents))]
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]


OTHERS = (
    talk("Hi.", "Hello!", "And \"now\"?\n\n1. x", "y\\", "z"),
    talk("Be kind.", "Hi", "There", "{{ .Role }}", roles=["system", "user", "assistant", "user"]),
    talk("a" * 300),
)
"""Conversations that were not among those of the check."""


@pytest.mark.parametrize(
    "source", [CHATML, HEADERS, TURNS, BRACKETS], ids=["chatml", "headers", "turns", "brackets"]
)
def test_families_of_templates(source: str, seedling: Tokenizer, process: RenderProcess) -> None:
    """Id by id on conversations that were not tried; what the model's own refuses is refused."""
    chat, template = made_of(source, seedling, process)
    require_equal(chat, template, seedling, OTHERS)
    assert chat.notices == () and chat.adds_bos
    assert BOS not in chat.source.replace(f"{BOS}[INST]", "")
    if source is TURNS:
        with pytest.raises(TemplateError, match="no such order of roles"):
            render(chat.source, ollama_values(OTHERS[1]))


def test_the_seedlings_own_template(seedling: Tokenizer, process: RenderProcess) -> None:
    chat, template = made_of(seedling.chat_template or "", seedling, process)
    require_equal(chat, template, seedling, OTHERS)
    assert chat.notices == ()
    # An answer that has begun is left open.
    begun = render(chat.source, ollama_values(talk("Say it.", "The ship")))
    assert begun == "<|user|>Say it.<|assistant|>The ship"
    with pytest.raises(TemplateError):
        render(chat.source, ollama_values(talk("x", roles=["tool"])))


def test_a_template_without_bos(process: RenderProcess) -> None:
    tokenizer = Tokenizer.of(tiny_tokenizer())
    chat, template = made_of(CHAT_TEMPLATE, tokenizer, process)
    require_equal(chat, template, tokenizer, [talk("one", "two", "three")])


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (LAST_USER, "does not write each message once, in order"),
        (NUMBERED, "between the start and user|between user and assistant"),
        (TWICE, "does not write each message once"),
        ("{{ raise_exception('never') }}", "no text for the roles user"),
    ],
    ids=["last user", "numbered", "twice", "never"],
)
def test_what_cannot_be_expressed_is_refused(
    source: str, said: str, seedling: Tokenizer, process: RenderProcess
) -> None:
    with pytest.raises(TemplateError, match=said):
        made_of(source, seedling, process)


def test_a_wrong_template_is_seen(seedling: Tokenizer, process: RenderProcess) -> None:
    """A stop token left out, a piece that is one space longer, a BOS too many."""
    chat, template = made_of(CHATML, seedling, process)
    start = '{{- $was := "" -}}'
    for old, new in (("<|im_end|>", ""), ("assistant\\n", "assistant\\n "), (start, BOS + start)):
        assert old in chat.source
        with pytest.raises(TemplateError, match="the Go template"):
            require_equal(replace(chat, source=chat.source.replace(old, new)), template, seedling, CHECKS)
    with pytest.raises(TemplateError, match="the Go template"):
        require_equal(replace(chat, adds_bos=False), template, seedling, CHECKS)


def test_a_template_that_does_not_begin_with_bos(seedling: Tokenizer, process: RenderProcess) -> None:
    """Breaks when Ollama puts a token before the text that was not there in training."""
    for source in (CHATML.removeprefix("{{ bos_token }}"), f" {CHATML}"):
        chat, template = made_of(source, seedling, process)
        require_equal(chat, template, seedling, OTHERS)
        assert not chat.adds_bos and chat.notices == ()


SPACED = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ SAID }}<|x|>{% endfor %}"


@pytest.mark.parametrize(
    ("said", "noticed"),
    [
        ("m.content.strip()", []),
        ("m.content.rstrip()", []),
        ("m.content", []),
        ("m.content | trim if m.role == 'user' else m.content", []),
        ("m.content.lstrip()", ["white space around a message"]),
        ("m.content.strip('\n')", ["white space around a message"]),
        ("m.content or 'nothing'", ["a message that says nothing"]),
        ("m.content.upper()", None),
    ],
)  # fmt: skip
def test_white_space_around_messages(
    said: str, noticed: list[str] | None, seedling: Tokenizer, process: RenderProcess
) -> None:
    """Stripped where the model's template strips it; what has no words is told, never written otherwise in silence."""
    source = SPACED.replace("SAID", said)
    if noticed is None:
        with pytest.raises(TemplateError, match="cannot be written"):
            made_of(source, seedling, process)
        return
    chat, template = made_of(source, seedling, process)
    assert [line.partition(" is ")[0] for line in chat.notices] == noticed
    padded = [talk("\u2009 Hi \x1f\u3000", "  \n", "x \u2028")]
    if not noticed:
        require_equal(chat, template, seedling, padded)
    else:
        with pytest.raises(TemplateError):
            require_equal(chat, template, seedling, [*padded, talk("\n"), talk("")])


@pytest.mark.skipif(not FILES, reason="the collection of chat templates is not on this machine")
@pytest.mark.parametrize("squeeze", [False, True], ids=["pretty", "squeezed"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_collection(path: Path, squeeze: bool, seedling: Tokenizer, process: RenderProcess) -> None:
    """Each can be written so that not an id differs, but for one kind of message in one family."""
    source = path.read_text(encoding="utf-8")
    chat, template = made_of(squeezed(source) if squeeze else source, seedling, process)
    require_equal(chat, template, seedling, OTHERS)
    blank = ["a message that says nothing is not written as by the model's template: send none"]
    assert list(chat.notices) == (blank if path.stem == "gemma-it" else [])
