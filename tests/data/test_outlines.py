"""What is joined from an outline is what the template writes; a template that looks at a text has no outline."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.data.conversation import Message, Row
from luthier.data.prepare import Reading, prepare, sources_of
from luthier.data.reading.rows import open_source
from luthier.data.rendering import outline
from luthier.data.rendering.causal import CausalRenderer
from luthier.data.rendering.process import RenderProcess
from luthier.data.rendering.renderer import Staged
from luthier.data.rendering.template import Template, Wanted
from tests.data import test_renderer
from tests.data.test_templates import FILES, squeezed

ROWS = Path(os.environ.get("LUTHIER_ROWS", Path(__file__).parents[3] / "shared" / "data"))
TEXTS = [
    "a", " ", "\n\t", " a", "a ", "\u2003x\u2003", "é你好 😀", "</think> x", "<think>a</think>b", "</s>", "{{ x }}",
    "\x1c a \x1f", "Qz4mT", "A", "\u0130", "<|im_end|>\n", "0", "none", "x\n\nx", "aa",
]  # fmt: skip
HABITS = [
    value
    for name, value in vars(test_renderer).items()
    if name.isupper() and isinstance(value, str) and "messages" in value
]
SAY = "{% for m in messages %}"
# What is written around two contents whatever they say, or whatever they say that keeps the usual.
PROVED = [
    SAY + "{{ m.content }};{% endfor %}",
    SAY + "{{ ' a' + m.content | trim + 'b' }}{% endfor %}",
    SAY + "{{ (' \n' + m.content + ' ') | trim }}{% endfor %}",
    SAY + "{{ (' ' ~ m.content ~ m.content).strip() ~ loop.index }}{% endfor %}",
    SAY + "{% set c = m.content.strip('\n') %}<{{ c.lstrip() }}>{% endfor %}",
    SAY + "{% if m.content %}{{ m.content }}{% else %}nothing{% endif %}{% endfor %}",
    SAY + "{% if '</think>' in m.content %}{{ m.content.split('</think>')[-1] }}{% else %}={{ m.content }}{% endif %}"
    "{% endfor %}",
    SAY + "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% endfor %}",
    SAY + "{% if m.content is string and m.content is not mapping and m.content is defined and m.content is not none %}"
    "{{ m.content | string }}{% endif %}{% endfor %}",
    SAY + "{% if m.content.startswith('<t') and m.content.endswith('>') %}t{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}",
    SAY + "{% if m.content == 'A' %}1{% elif m.content != '' %}{{ m.content | default('x') }}{% endif %}{% endfor %}",
    "{% macro say(c) %}[{{ c | trim }}]{% endmacro %}" + SAY + "{{ say(m.content) | trim }}{% endfor %}",
    SAY + "{% set x %} {{ m.content }} {% endset %}{{ x | trim }}{% endfor %}",
    SAY + "{% filter trim %}\n{{ m.content }}\n{% endfilter %}{% endfor %}",
    "{% set ns = namespace(last='') %}" + SAY + "{% set ns.last = m.content %}{% endfor %}{{ ns.last }}",
    "{{ messages | map(attribute='content') | map('trim') | list | last }}",
    SAY + "{{ m.content.replace('\\r', '') }}{% endfor %}",
    "{% for m in messages if m.content %}{{ m.role }}{% endfor %}",
    SAY + "{{ 1 if m.content in ['none', 'AB'] else m.content }}{% endfor %}",
]
# What depends on a text in a way that no premise covers.
LOOKS = [
    "{{ messages[0].content | length }}",
    "{{ messages[0].content[:1] }}",
    "{{ messages[0].content | upper }}",
    "{{ messages[0].content.title() }}",
    "{{ messages[0].content | tojson }}",
    "{{ messages | tojson }}",
    "{{ messages[0] }}",
    "{{ messages | string }}",
    "{{ messages[0].content == messages[1].content }}",
    "{{ messages[0].content in {'a': 1} }}",
    "{{ {'a': 1}.get(messages[0].content, 2) }}",
    "{{ 'aa'.count(messages[0].content) }}",
    "{{ messages[0].content < 'b' }}",
    "{{ messages[0].content | int }}",
    "{{ [messages[0].content] | map('int') | sum }}",
    "{{ [messages[0].content] | join('-') }}",
    "{{ '%s' % messages[0].content }}",
    "{{ '{}'.format(messages[0].content) }}",
    "{{ messages[0].content * 2 }}",
    "{{ messages[0].content is upper }}",
    "{{ messages[0].content is eq messages[1].content }}",
    "{{ messages | map(attribute='content') | unique | list | length }}",
    "{{ messages | sort(attribute='content') | map(attribute='role') | first }}",
    "{{ messages | groupby('content') | length }}",
    "{% for sign in messages[0].content %}.{% endfor %}",
    "{{ (messages[0].content + 'x').split('x')[0] }}",
    "{{ 'ax' in messages[0].content + 'x' }}",
    "{{ (messages[0].content + 'x').startswith('ax') }}",
    "{{ messages[0].content.strip('a') }}",
    "{{ messages[0].content is sequence and messages[0].content | first }}",
    "{{ messages[0].content | indent }}",
    "{{ messages[0].content | replace('a', 'b') }}",
    "{{ messages[0].content | e }}",
    "{{ messages[0].content.pieces is defined }}",
    "{{ messages.index({'role': 'user', 'content': 'a'}) }}",
    "{{ [1, 2] | random }}{{ messages[0].content }}",
]


@pytest.fixture(scope="module")
def process() -> Iterator[RenderProcess]:
    made = RenderProcess()
    yield made
    made.close()


def outlined(template: Template, rows: Sequence[Staged]) -> tuple[int, int]:
    """How many renderings of rows there are and how many come from outlines, all of which must be the template's."""
    stages = [stage for row in rows for stage in row.stages]
    asked = {(id(stage), place) for stage, place, _ in outline.Outlines(template).give(stages)}
    todo = [(stage, place, wanted) for stage in stages for place, wanted in stage.foreseen()]
    truth = template.render_many([wanted for _, _, wanted in todo])
    given = [(each, text) for each, text in zip(todo, truth, strict=True) if (id(each[0]), each[1]) not in asked]
    for (stage, place, wanted), text in given:
        assert stage._known[place] == text, (template.name, wanted)
    return len(todo), len(given)


def rendered(template: Template, texts: Sequence[tuple[str, str]], tokenizer: Any, talk: Any) -> tuple[int, int]:
    renderer = CausalRenderer(tokenizer, template)
    return outlined(template, [renderer.stage(talk(("user", one), ("assistant", two))) for one, two in texts])


@pytest.mark.parametrize("source", PROVED)
def test_what_a_template_does_whatever_texts_say_is_outlined(make_tokenizer, talk, process, source):
    template = Template(source, {}, name=source, process=process)
    texts = [("a", each) for each in TEXTS] + [(each, "b") for each in TEXTS]
    texts += zip(TEXTS, TEXTS[::-1], strict=True)
    count, given = rendered(template, texts, make_tokenizer("bytes"), talk)
    assert given > count / 3


@pytest.mark.parametrize("source", LOOKS)
def test_a_template_that_looks_at_a_text_is_seen(process, source):
    template = Template(source, {}, name=source, process=process)
    messages = [{"role": "user", "content": 0}, {"role": "assistant", "content": 1}]
    assert template.outlines([Wanted(messages)]) == [None]


def test_what_is_no_template_any_more_has_no_outline_and_ends_nothing(process):
    """Breaks when a template that runs out of time or memory takes the outlines of others, or their texts, with it."""
    wanted = Wanted([{"role": "user", "content": 0}])
    for source in ("{% for i in range(10000000) %}{% endfor %}", "{{ raise_exception('no') }}", test_renderer.SHOUTS):
        bad = Template(source, {}, name="bad", process=process)
        assert bad.outlines([wanted, wanted])[0] is None or source is test_renderer.SHOUTS
        good = Template("<{{ messages[0].content }}>", {}, name="good", process=process)
        assert good.outlines([wanted])[0] is not None and good.render([{"content": "x"}]) == "<x>"


@pytest.mark.parametrize("source", HABITS)
def test_habits(make_tokenizer, talk, process, source):
    tokenizer = make_tokenizer("bytes")
    template = Template(source, tokenizer.special_tokens, name=source, process=process)
    rendered(template, list(zip(TEXTS, TEXTS[3:], strict=False)), tokenizer, talk)


def test_other_fields_and_empty_contents_are_part_of_a_shape(make_tokenizer, talk, process):
    """Breaks when a row is filled into the outline of one with other names, tools or calls, or with a text there."""
    source = (
        "{{ tools | tojson if tools }}" + SAY + "{{ m.name }}{{ m.content or 'nothing' }}"
        "{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}"
    )
    tokenizer = make_tokenizer("bytes")
    renderer = CausalRenderer(tokenizer, Template(source, {}, name="t", process=process))
    rows = [
        talk(Message("user", text, name=name), ("assistant", "b" + text), tools=tools)
        for text in ("", "x", " ")
        for name in ("", "kim")
        for tools in ((), ({"function": {"name": "f"}},))
    ]
    count, given = outlined(renderer.template, [renderer.stage(row) for row in rows * 2])
    assert 0 < given < count


def _staged(path: str, renderer: CausalRenderer) -> list[Staged]:
    (source,) = sources_of(path, Reading(wanted=("conversation", "preference")))
    return [renderer.stage(item) for item in open_source(source).items if isinstance(item, Row)]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not ROWS.is_dir() or not FILES, reason="the collections are not on this machine")
@pytest.mark.parametrize(
    "file", ["alpaca_en_demo.json", "glaive_toolcall_en_demo.json", "dpo_en_demo.json", "gsm8k_train.jsonl#2000"]
)
def test_all_rows_under_all_templates(make_tokenizer, process, file):
    tokenizer = make_tokenizer("bytes")
    texts = [each.read_text("utf-8") for each in FILES]
    for source in [*texts, *map(squeezed, texts), *HABITS]:
        template = Template(source, tokenizer.special_tokens, name=source[:80], process=process)
        staged = _staged(f"{ROWS}/{file}", CausalRenderer(tokenizer, template))
        for start in range(0, len(staged), 64):
            outlined(template, staged[start : start + 64])


@pytest.mark.skipif(not ROWS.is_dir() or not FILES, reason="the collections are not on this machine")
@pytest.mark.parametrize("template", [str(path) for path in FILES if path.stem in ("gemma-it", "qwen2.5-instruct")])
def test_what_is_stored_is_what_the_template_alone_would_give(make_tokenizer, tmp_path, monkeypatch, template):
    reading = Reading(template=template, max_tokens=800, over_length="truncate", on_bad_row="skip")
    files = [f"{ROWS}/alpaca_en_demo.json#40", f"{ROWS}/glaive_toolcall_en_demo.json#8"]
    ours = prepare(files, make_tokenizer("bytes"), reading, cache=tmp_path / "ours")
    monkeypatch.setattr(
        outline.Outlines, "give", lambda _, stages: [(each, *more) for each in stages for more in each.foreseen()]
    )
    theirs = prepare(files, make_tokenizer("bytes"), reading, cache=tmp_path / "theirs")
    for name in ("tokens", "weights", "roles", "spans", "rows", "offsets"):
        assert np.array_equal(getattr(ours.store, name), getattr(theirs.store, name)), name
    assert ours.counts() == theirs.counts() and ours.notices == theirs.notices and len(ours.store) > 24
