"""Rows that are laid out, weighed and checked many at once become what each becomes by itself."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from luthier.core.errors import DataError
from luthier.data import intake as intake_module
from luthier.data import spellings as spellings_module
from luthier.data import words as words_module
from luthier.data.checks import check_rendered, sound_rows
from luthier.data.conversation import Conversation, Message, Row
from luthier.data.prepare import Prepared, Reading, prepare
from luthier.data.rendering import renderer as renderer_module
from luthier.data.rendering.causal import CausalRenderer
from luthier.data.rendering.layout import LONGEST, Filled, Layouts
from luthier.data.rendering.process import RenderProcess
from luthier.data.rendering.template import Template
from luthier.data.rendering.turns import TRIMS, lay_out
from luthier.kernels.native_build import COMPILERS
from luthier.kernels.words import compiled
from tests.data.conftest import build
from tests.data.test_native_rows import CASES, CHATML, WORDS, talks
from tests.data.test_outlines import HABITS, PROVED, TEXTS
from tests.data.test_renderer import TRAILING_SPACE
from tests.data.test_templates import FILES

pytestmark = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="there is no compiler")

ENDS_IN_EOS = "{{ bos_token }}" + TRAILING_SPACE
SOURCES = [CHATML, *PROVED, *HABITS, *(path.read_text("utf-8") for path in FILES)]
PLAIN = {**CASES, "a stop token of the model": {"adds_bos": True, "eos": "<|im_end|>", "generation_eos": (5,)}}


@pytest.fixture(scope="module")
def process() -> Iterator[RenderProcess]:
    made = RenderProcess()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """C++ from the first row on, and batches that end in the middle of everything."""
    compiled()
    monkeypatch.setattr(renderer_module, "_LOOK", 0)
    monkeypatch.setattr(words_module, "_MUCH", 0)
    monkeypatch.setattr(spellings_module, "_MANY", 0)
    monkeypatch.setattr(intake_module, "BATCH_ROWS", 7)


def row_of(number: int, *turns: tuple[str, str]) -> Row:
    messages = tuple(Message(role, text) for role, text in turns)  # type: ignore[arg-type]
    return Row(number, f"rows.jsonl:{number + 1}:1", Conversation(messages))


@pytest.mark.parametrize("source", SOURCES)
def test_a_layout_is_what_renderings_of_the_row_say(source: str, make_tokenizer, process: RenderProcess) -> None:
    """Breaks when a turn or a message stands elsewhere in a text that is laid out, or a notice is not given."""
    tokenizer = make_tokenizer("bytes")
    renderer = CausalRenderer(tokenizer, Template(source, tokenizer.special_tokens, name="test", process=process))
    texts = [*TEXTS, "100 % {} %s", "Wk9xB Qz4mT"]
    asked = zip(texts * 2, [*texts[5:], *texts[::-1], *texts[:5]], strict=True)
    rows = [row_of(number, ("user", one), ("assistant", two)) for number, (one, two) in enumerate(asked)]
    talked = [("user", "b"), ("assistant", " c ")]
    rows += [row_of(99, ("system", one), *talked, ("user", "b"), ("assistant", one)) for one in TEXTS]
    for row in (*rows, *rows):
        staged = renderer._staged(row)
        if isinstance(staged.ready, DataError):
            continue
        renderer.foresee([staged])
        assert isinstance(row.content, Conversation)
        filled, told = renderer._layouts.fill(row.content), []
        if filled is None:
            continue
        (view,) = lay_out(staged.stages[0], lambda *words, told=told: told.append(words))
        answers = [place for each in view.answers for place in (each.start, each.ending, each.stop)]
        assert filled.text == view.text and list(filled.places) == [*(end for end, _ in view.bounds), *answers]
        assert [turn.weight for turn in filled.layout.turns] == [each.weight for each in view.answers]
        assert [text for text, _ in told] == [TRIMS] * len(filled.trimmed)
    if source == CHATML:
        assert sum(isinstance(renderer.stage(row).ready, Filled) for row in rows) > len(rows) / 2


def written(path: Path, rows: Sequence[Row]) -> Path:
    lines = []
    for row in rows:
        assert isinstance(row.content, Conversation)
        turns = [
            {"role": each.role, "content": each.content} | ({} if each.weight is None else {"weight": each.weight})
            for each in row.content.messages
        ]
        lines.append(json.dumps({"messages": turns}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("source", [CHATML, CHATML.replace("m.content", "m.content | trim"), ENDS_IN_EOS])
@pytest.mark.parametrize("settings", PLAIN.values(), ids=PLAIN)
def test_what_is_stored_is_what_each_row_becomes_by_itself(
    settings: dict, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when a token, a weight, a count, a notice, a digest or an error of a row depends on the rows around it."""
    template = tmp_path / "template.jinja"
    template.write_text(source, encoding="utf-8")
    rows = written(tmp_path / "rows.jsonl", [row for seed in range(3) for row in talks(seed, 60)])
    accepted: list[Row] = []
    accept = CausalRenderer.accept

    def counted(self: CausalRenderer, row: Row, *more) -> None:
        accepted.append(row)
        accept(self, row, *more)

    monkeypatch.setattr(CausalRenderer, "accept", counted)
    made: list[Prepared] = []
    for name in ("together", "apart"):
        if name == "apart":
            monkeypatch.setattr(Layouts, "fill", lambda self, conversation: None)
        reading = Reading(template=str(template), max_tokens=300, over_length="truncate", on_bad_row="skip")
        before = len(accepted)
        with np.errstate(over="ignore"):  # a weight too large is infinite, and refused for that
            made.append(prepare(rows, build(**settings), reading, cache=tmp_path / name, fraction=0.2))
        ends_known = source == ENDS_IN_EOS or settings["eos"] == "<|im_end|>"
        assert (len(accepted) - before > 10) == (name == "together" and ends_known)
    ours, theirs = made
    for name in ("tokens", "weights", "roles", "spans", "rows", "offsets"):
        assert np.array_equal(getattr(ours.store, name), getattr(theirs.store, name)), name
    assert np.array_equal(ours.report.records, theirs.report.records)
    assert ours.counts() == theirs.counts() and ours.notices == theirs.notices
    assert ours.report.answers == theirs.report.answers and ours.report.examples == theirs.report.examples
    assert [str(each) for each in ours.report.rejects] == [str(each) for each in theirs.report.rejects]
    assert ours.store.stop_ids == theirs.store.stop_ids


def test_rows_that_look_sound_are(make_tokenizer) -> None:
    """Breaks when a spoiled row of a batch is taken for sound, in which the check of that row finds something."""
    tokenizer = build(adds_bos=True, eos="<|im_end|>")
    renderer = CausalRenderer(tokenizer, Template(CHATML, tokenizer.special_tokens, name="test"))
    draw = random.Random(3)
    said = [" ".join(draw.choices(WORDS, k=20)).strip() or "word" for _ in range(12)]
    rows = [row_of(number, ("user", text), ("assistant", text[::-1])) for number, text in enumerate(said)]
    for _ in range(2):
        renderer.foresee([renderer._staged(row) for row in rows])
    staged = [renderer.stage(row) for row in rows]
    renderer.encode_ahead(staged)
    batch = renderer.weigh_ahead()
    assert batch is not None and len(batch) == len(rows) and all(sound_rows(batch, renderer))
    for one in staged:
        # What is known of a row that has to be looked at by itself after all.
        assert renderer._tokens_ahead is not None and isinstance(one.ready, Filled)
        known = renderer._tokens_ahead.of_row(one.ready)
        assert list(known) == [one.ready.text, one.ready.text[: one.ready.places[2]]]
        for ours, theirs in zip(known.values(), tokenizer.encode_closed(list(known)), strict=True):
            assert all(np.array_equal(mine, their) for mine, their in zip(ours, theirs, strict=True))
    ends, found = [0, *batch.rows.ends.tolist()], 0
    for _ in range(200):
        place = draw.randrange(len(rows))
        at = draw.randrange(ends[place], ends[place + 1])
        ids, weights, spans = (each.copy() for each in (batch.rows.ids, batch.rows.weights, batch.rows.spans))
        match draw.randrange(4):
            case 0:
                ids[at] = draw.choice(ids.tolist())
            case 1:
                weights[at] = draw.choice([0.0, 1.0, -1.0, np.nan, np.inf])
            case 2:
                spans[at] += draw.choice([-1, 1])
            case 3:
                ids[at] = tokenizer.bos_id
        spoiled = replace(batch, rows=replace(batch.rows, ids=ids, weights=weights, spans=spans))
        sound = sound_rows(spoiled, renderer)
        for number, (row, view) in enumerate(zip(rows, spoiled.views(), strict=True)):
            if sound[number]:
                assert check_rendered(view, renderer, row) == []
            found += not sound[number] and number == place
            assert sound[number] or number == place
    assert found > 100


def test_what_is_not_as_nearly_all_rows_are_is_not_laid_out(make_tokenizer) -> None:
    tokenizer = make_tokenizer("bytes")
    renderer = CausalRenderer(tokenizer, Template(CHATML, tokenizer.special_tokens, name="test"))
    rows = [row_of(number, ("user", "a"), ("assistant", "b")) for number in range(3)]
    for row in rows:
        renderer.foresee([renderer.stage(row)])
    assert isinstance(renderer.stage(rows[0]).ready, Filled)
    odd = [
        row_of(3, ("user", "a <|im_end|>"), ("assistant", "b")),
        row_of(4, ("user", "a" * LONGEST), ("assistant", "b")),
        row_of(5, ("user", ""), ("assistant", "b")),
        Row(6, "rows.jsonl:7:1", Conversation((Message("user", "a", name="kim"), Message("assistant", "b")))),
        Row(7, "rows.jsonl:8:1", Conversation((Message("user", "a"), Message("assistant", "b", weight=0.5)))),
        Row(8, "rows.jsonl:9:1", replace(rows[0].content, tools=({"function": {"name": "f"}},))),  # type: ignore[type-var]
    ]
    assert not any(isinstance(renderer.stage(row).ready, Filled) for row in odd)
    assert not isinstance(CausalRenderer(tokenizer, renderer.template, train_on="all").stage(rows[0]).ready, Filled)
