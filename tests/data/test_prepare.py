"""From files to tokens: the same tokens as ever, every row accounted for, and warnings that name their cause."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.core.errors import DataError, RecipeError, TemplateError
from luthier.data import prepare as prepare_module
from luthier.data.prepare import Prepared, Reading, Together, prepare
from luthier.data.rendering.process import RenderProcess
from luthier.data.rendering.renderer import TooLongError
from luthier.data.rendering.template import Template
from luthier.data.split import Split, split
from luthier.data.tokenizer import Tokenizer
from tests.data.conftest import build
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

Row = Sequence[tuple[str, str]]
Make = Callable[..., Prepared]
SAMPLE = "58e1e6b4"
"""The beginning of the digest of the sample as commit be9eb0b made it, before rows were streamed."""


def chat(*turns: tuple[str, str]) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}) + "\n"


def ask(question: str, answer: str) -> str:
    return chat(("user", question), ("assistant", answer))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.of(tiny_tokenizer())


@pytest.fixture
def made(tmp_path: Path, tokenizer: Tokenizer) -> Make:
    """`made(rows, evaluation=rows, reading settings)`: files in a folder, prepared with a cache beside them."""

    def make(
        rows: Sequence[str],
        *,
        held: Sequence[str] = (),
        fraction: float = 0.0,
        seed: int = 0,
        together: Together = "copies",
        reserve: float = 0.0,
        read_by: Tokenizer = tokenizer,
        **settings: Any,
    ) -> Prepared:
        train, evaluation = tmp_path / "train.jsonl", tmp_path / "held.jsonl"
        train.write_text("".join(rows), encoding="utf-8")
        evaluation.write_text("".join(held), encoding="utf-8")
        return prepare(
            train,
            read_by,
            Reading(**settings),
            evaluation=evaluation if held else None,
            fraction=fraction,
            seed=seed,
            together=together,
            reserve=reserve,
            context_tokens=256,
            cache=tmp_path / "cache",
        )

    return make


def digest(data: Prepared) -> str:
    found = hashlib.sha256()
    for name in ("tokens", "weights", "roles", "spans", "rows", "offsets"):
        found.update(getattr(data.store, name).tobytes())
    found.update(data.held_out.indices.tobytes() + data.train.indices.tobytes())
    return found.hexdigest()


def sample() -> list[str]:
    rows = [ask(f"what is {n} and {n * n % 17}?", f"it is {n + n * n % 17}") for n in range(40)]
    long = chat(("system", "brief"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    return [*rows[:20], long, *rows[20:]]


# ------------------------------------------------------------------------------------------------- tokens and counts


def test_the_tokens_of_a_sample_are_what_they_always_were(made: Make) -> None:
    """Breaks when tokens, row numbers, their order or the split change: a run could not go on with its data."""
    data = made(sample(), fraction=0.1)
    assert digest(data).startswith(SAMPLE)
    assert data.store.rows.tolist() == list(range(41)) and len(data.held_out) == 4
    assert digest(made(sample(), fraction=0.1)) == digest(data)
    assert not digest(made([*sample()[1:], sample()[0]], fraction=0.1)).startswith(SAMPLE)


def test_every_row_has_its_address(made: Make, tmp_path: Path) -> None:
    """Breaks when a row's number leads to another line than its own."""
    lines = ["\n", ask("a", "b"), "{\n", "\n", ask("c", "d")]
    data = made(lines, held=[ask("e", "f")], on_bad_row="skip")
    assert [data.report.where(row) for row in (0, 1, 2, 3)] == [
        f"{tmp_path}/train.jsonl:2:1", f"{tmp_path}/train.jsonl:5:1", f"{tmp_path}/held.jsonl:1:1", "",
    ]  # fmt: skip
    assert (data.report.read, data.report.kept, data.report.rejected) == (4, 3, 1)
    assert [reject.where for reject in data.report.rejects] == [f"{tmp_path}/train.jsonl:3:2"]


def test_what_is_cached_is_not_read_again_and_knows_its_rejects(
    made: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Breaks when a second run over the same data has other counts, rejects, notices or addresses than the first."""
    lines = [ask("a", "b"), "{\n", ask("a", "b <|start|>"), ask("c", "d")]
    first = made(lines, on_bad_row="skip")
    monkeypatch.setattr(prepare_module, "Intake", None)
    again = made(lines, on_bad_row="skip")
    assert again.counts() == first.counts() and again.notices == first.notices and first.notices
    assert [str(one) for one in again.report.rejects] == [str(one) for one in first.report.rejects]
    assert [again.report.where(row) for row in range(4)] == [first.report.where(row) for row in range(4)]
    moved = tmp_path / "moved"
    moved.mkdir()
    (tmp_path / "train.jsonl").rename(moved / "train.jsonl")
    tokenizer = first.renderer.tokenizer
    reading = Reading(on_bad_row="skip")
    elsewhere = prepare(moved / "train.jsonl", tokenizer, reading, context_tokens=256, cache=tmp_path / "cache")
    assert next(one.where for one in elsewhere.report.rejects) == f"{moved}/train.jsonl:2:2"
    assert f"{moved}/train.jsonl:3:1" in " ".join(elsewhere.notices)


def test_a_log_that_is_damaged_is_made_again(made: Make) -> None:
    """Breaks when a cached store is used whose log of the rows is missing or altered."""
    rows = [ask("a", "b"), ask("c", "d")]
    first = made(rows)
    for name in ("log.json", "log.npy"):
        (first.store.folder / name).write_bytes(b"{}")
        assert made(rows).counts() == first.counts()


@pytest.mark.parametrize("again", [False, True])
def test_a_file_that_changes_while_it_is_prepared(
    made: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, again: bool
) -> None:
    """Breaks when tokens are stored under the digest of another content."""
    plain = prepare_module.demand_readable

    def changed(sources: Any, *, keep: int) -> Any:
        read = plain(sources, keep=0 if again else keep)
        assert (read is None) == again
        with (tmp_path / "train.jsonl").open("a", encoding="utf-8") as file:
            file.write(ask("e", "f"))
        return read

    monkeypatch.setattr(prepare_module, "demand_readable", changed)
    with pytest.raises(DataError, match="changed while it was read"):
        made([ask("a", "b"), ask("c", "d")])
    assert list((tmp_path / "cache").iterdir()) == []


# ------------------------------------------------------------------------------------------------------- bad rows


REFUSED = ask("a", "it ends <|end|> early")


def test_skip_leaves_out_what_the_template_or_a_check_refuses(made: Make, tmp_path: Path) -> None:
    """Breaks when a refused row stops the run although bad rows are skipped, is trained, or leaves a count behind."""
    silent = json.dumps(
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}
    )
    data = made([ask("a", "b"), REFUSED, silent + "\n", "{\n", ask("c", "d")], on_bad_row="skip")
    assert (data.report.read, data.report.kept, data.report.rejected) == (5, 2, 3)
    assert data.store.rows.tolist() == [0, 4]
    found = [(one.where.removeprefix(str(tmp_path)), one.received) for one in data.report.rejects]
    assert found[0][0] == "/train.jsonl:2:1" and "at which generation stops" in found[0][1]
    assert found[1][0] == "/train.jsonl:3:1" and "no token is trained" in found[1][1]
    assert found[2][0] == "/train.jsonl:4:2"
    clean = made([ask("a", "b"), ask("c", "d")])
    assert data.store.counts == clean.store.counts and data.store.stop_ids == clean.store.stop_ids
    assert data.store.tokens.tolist() == clean.store.tokens.tolist()


def test_raise_names_every_refused_row(made: Make, tmp_path: Path) -> None:
    """Breaks when a refused row has no address, the counts are missing, or advice hangs on the last row."""
    with pytest.raises(DataError, match=r"2 of 4 rows cannot be used \(2 can\)") as caught:
        made([ask("a", "b"), REFUSED, ask("c", "d"), REFUSED])
    assert f"{tmp_path}/train.jsonl:2:1" in str(caught.value) and "and 1 rows alike" in str(caught.value)
    *listed, advice = str(caught.value).splitlines()
    assert advice.startswith("mend them") and all(line.startswith("  ") for line in listed[1:])
    assert list((tmp_path / "cache").iterdir()) == []
    with pytest.raises(DataError, match="20 of 21 rows .* stopped after 20 bad rows"):
        made([ask("a", "b"), *[REFUSED] * 90])


def test_rows_that_cannot_be_read_are_told_before_any_is_rendered(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a broken last line is found only after minutes of rendering."""
    monkeypatch.setattr(Template, "render_many", lambda *_: pytest.fail("a row was rendered"))
    with pytest.raises(DataError, match="1 of 3 rows"):
        made([ask("a", "b"), ask("c", "d"), "{\n"])


def test_a_row_that_is_too_long_is_never_skipped(made: Make) -> None:
    """Breaks when `on_bad_row: skip` decides about long rows, which is `over_length`'s to decide."""
    rows = [ask("a", "b"), ask("a " * 90, "b"), "{\n"]
    with pytest.raises(DataError, match="the conversation has .* tokens") as caught:
        made(rows, on_bad_row="skip", max_tokens=32)
    assert "over_length" in str(caught.value) and "on_bad_row=skip" not in str(caught.value)
    assert issubclass(TooLongError, DataError)
    data = made(rows, on_bad_row="skip", max_tokens=32, over_length="drop")
    assert data.report.rejected == 1 and data.store.counts.dropped == 1 and len(data.store) == 1


def test_no_row_left_is_an_error(made: Make) -> None:
    """Breaks when a run starts without a row."""
    with pytest.raises(DataError, match="none of the 2 rows can be used(.|\n)*no row is left"):
        made(["{\n", REFUSED], on_bad_row="skip")
    with pytest.raises(DataError, match="none of the 1 rows is left to train on"):
        made([ask("a " * 90, "b")], max_tokens=32, over_length="drop")


# ------------------------------------------------------------------------------------------------------- warnings


def only(data: Prepared, words: str) -> str:
    found = [notice for notice in data.notices if words in notice]
    assert len(found) == 1, data.notices
    return found[0]


def test_sound_rows_have_no_warning(made: Make) -> None:
    """The negative control of the tests below. Breaks when sound data is warned of."""
    rows = [ask(f"question {n}", f"answer {n}") for n in range(12)]
    assert made(rows, fraction=0.25).notices == ()
    assert made(rows[:8], held=rows[8:]).notices == ()


@pytest.mark.parametrize("nothing", ["\u200b", "<|pad|>", "\u200b\u2060"])
def test_empty_answers_are_told_and_only_empty_ones_are_an_error(made: Make, tmp_path: Path, nothing: str) -> None:
    """Breaks when the loss would be flat because nothing but the end of a turn is trained, and nobody says so."""
    # The tiny tokenizer writes ASCII only.
    other = {} if nothing.isascii() else {"read_by": build(marks=("<|start|>", "<|end|>"), template=CHAT_TEMPLATE)}
    empty = ask("c", nothing)
    said = only(made([ask("a", "b"), empty, ask("e", "f"), empty], **other), "are empty")
    assert "2 of 4 answers (50.0 %)" in said and f"first: {tmp_path}/train.jsonl:2:1" in said
    with pytest.raises(DataError, match="all 2 answers are empty.*loss would be flat") as caught:
        made([empty, ask("g", nothing)], **other)
    assert caught.value.where == f"{tmp_path}/train.jsonl:1:1" and caught.value.exit_code == 65


def test_where_everything_is_trained_no_answer_counts_as_empty(made: Make) -> None:
    """Breaks when what a template writes behind an answer is taken for an answer of its own."""
    rows = [chat(("user", f"a {n}"), ("assistant", "b"), ("user", "c"), ("assistant", f"d {n}")) for n in range(4)]
    assert made(rows, train_on="all").notices == ()


def test_rows_of_the_evaluation_that_are_trained_too(made: Make, tmp_path: Path) -> None:
    """Breaks when a held-out loss is reported on rows that were trained on, without a word."""
    train = [ask(f"question {n}", f"answer {n}") for n in range(6)]
    held = [ask("other", "thing"), train[3], ask("Question  4", "ANSWER 4"), ask("new", "one")]
    said = only(made(train, held=held), "evaluation rows")
    assert "2 of 4 evaluation rows (50.0 %) are training rows too, 1 of them token for token" in said
    assert f"first: {tmp_path}/held.jsonl:2:1 = {tmp_path}/train.jsonl:4:1" in said
    assert "are training rows too, token for token (first" in only(made(train, held=train[3:4]), "evaluation rows")


def test_copies_within_training(made: Make, tmp_path: Path) -> None:
    """Breaks when copies are not counted, or counted among rows that differ."""
    rows = [ask("a", "b"), ask("c", "d"), ask("a", "b"), ask("A", "b"), ask("a", "b")]
    said = only(made(rows), "repeat an earlier one")
    assert "3 of 5 training rows (60.0 %) repeat an earlier one, 2 of them token for token" in said
    assert f"{tmp_path}/train.jsonl:3:1 = {tmp_path}/train.jsonl:1:1" in said


def test_copies_stay_on_one_side_of_the_split(made: Make) -> None:
    """Breaks when a held-out row has been trained on under another number."""
    rows = [ask(f"question {n % 15}", f"answer {n % 15}") for n in range(45)]
    for seed in range(5):
        data = made(rows, fraction=0.2, seed=seed)
        sides = [{int(row) % 15 for row in data.store.rows[part.indices]} for part in (data.train, data.held_out)]
        assert not sides[0] & sides[1] and len(data.held_out) == 9
        assert "30 rows are copies of others; copies stay on one side of the split" in only(data, "one side")
        assert not any("evaluation rows" in notice for notice in data.notices)
    alike = made([ask("a", "b")] * 8, fraction=0.25)
    assert len(alike.held_out) == 0 and "none is held out" in only(alike, "none is held out")
    two = made([*[ask("a", "b")] * 8, *[ask("c", "d")] * 5], fraction=0.1)
    assert two.store.rows[two.held_out.indices].tolist() == [8, 9, 10, 11, 12]


def test_answers_to_one_prompt_stay_on_one_side_where_that_is_asked(made: Make) -> None:
    """Breaks when a model is judged by a prompt to which it has been trained other answers."""
    rows = [ask(f"question {n % 10}", f"answer {n}") for n in range(40)]
    for seed in range(4):
        data = made(rows, fraction=0.2, seed=seed, together="prompts")
        sides = [{int(row) % 10 for row in data.store.rows[part.indices]} for part in (data.train, data.held_out)]
        assert not sides[0] & sides[1] and len(data.held_out) == 8 and len(data.train) == 32
        only(data, "30 rows are copies or answers to the prompts of others")
    plain = made(rows, fraction=0.2, seed=0)
    assert {int(row) % 10 for row in plain.store.rows[plain.held_out.indices]} & {
        int(row) % 10 for row in plain.store.rows[plain.train.indices]
    }
    # Texts have no prompt: each is its own.
    texts = [json.dumps({"text": f"The same, and {n}."}) + "\n" for n in range(20)]
    assert len(made(texts, fraction=0.2, together="prompts").held_out) == 4


@pytest.mark.parametrize("together", ["copies", "prompts"])
def test_what_is_reserved_is_what_another_run_holds_out(made: Make, together: Together) -> None:
    """Breaks when what a rate was chosen by is what is reported, or reserved rows are trained."""
    rows = [ask(f"question {n % 10}", f"answer {n}") for n in range(40)]
    judged = made(rows, fraction=0.2, seed=3, together=together)
    chosen = made(rows, fraction=0.25, reserve=0.2, seed=3, together=together)
    parts = [set(part.indices.tolist()) for part in (chosen.train, chosen.held_out, judged.held_out)]
    assert set().union(*parts) == set(range(40)) and sum(map(len, parts)) == 40
    assert len(parts[1]) == 8 and "8 rows are reserved" in only(chosen, "reserved")


def test_of_one_long_text_the_pieces_before_the_reserve_are_held_out() -> None:
    """Breaks when a piece is on two sides or on none."""
    judged, chosen = Split.of_pieces(20, 0.1), Split.of_pieces(20, 0.2, reserve=0.1)
    assert np.flatnonzero(judged.held_views).tolist() == [18, 19] and judged.train_views.sum() == 18
    assert np.flatnonzero(chosen.held_views).tolist() == [14, 15, 16, 17]
    assert np.flatnonzero(chosen.train_views).tolist() == list(range(14))


def test_the_split_without_copies_is_a_plain_draw() -> None:
    """Breaks when rows without copies are drawn in another way than they always were."""
    rows = np.arange(100) * 2
    chosen = np.random.default_rng([7, 0x5EED]).permutation(rows)[:10]
    for groups in (None, np.arange(100)):
        found = split(rows, np.repeat(rows, 3), groups, fraction=0.1, seed=7)
        assert set(rows[found.held_rows]) == set(chosen) and int(found.held_views.sum()) == 30
    assert not split(rows, rows, None, fraction=0.0, seed=7).held_rows.any()


def test_one_answer_for_everything(made: Make) -> None:
    """Breaks when a data set that teaches one sentence is not told apart, or one that does not is warned of."""
    rows = [ask(f"question {n}", "no" if n % 3 else f"yes {n}") for n in range(12)]
    assert "8 of 12 training rows (66.7 %) have one and the same answer" in only(made(rows), "the same answer")
    half = [ask(f"question {n}", "no" if n % 2 else f"yes {n}") for n in range(12)]
    assert made(half).notices == ()


DROPS = (
    "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}<|start|>assistant\n...<|end|>\n"
    "{% else %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
OTHERWISE = DROPS.replace(" and not loop.last", " and false").replace(
    "<|start|>assistant\n{% endif %}", "<|start|>bot\n{% endif %}"
)


@pytest.mark.parametrize(("source", "words", "first", "second"), [
    (DROPS, "changes history", "one<|end|>", "...<|end|>"),
    (OTHERWISE, "generation prompt is not how", "<|start|>bot", "<|start|>assistant"),
])  # fmt: skip
def test_a_template_that_changes_history_is_named(
    made: Make, tmp_path: Path, source: str, words: str, first: str, second: str
) -> None:
    """Breaks when a template makes every answer a view of its own and nobody is told why, where and what helps."""
    path = tmp_path / "own.jinja"
    path.write_text(source, encoding="utf-8")
    rows = [
        ask("a", "b"),
        *[chat(("user", "x"), ("assistant", "one"), ("user", "y"), ("assistant", f"two {n}")) for n in range(3)],
    ]
    said = only(made(rows, template=str(path)), words)
    assert first in said and second in said and "data.template: chatml" in said
    assert f"{tmp_path}/train.jsonl:{1 if 'prompt' in words else 2}:1" in said


def test_a_prompt_that_is_not_how_the_row_begins_is_refused_with_both_texts(made: Make, tmp_path: Path) -> None:
    """Breaks when a template that trains the header of an answer is refused without the place where it differs."""
    path = tmp_path / "own.jinja"
    path.write_text(
        "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}", encoding="utf-8"
    )
    with pytest.raises(TemplateError, match="1 of 1 rows cannot be used") as caught:
        made([ask("a", "b")], template=str(path))
    assert "before an answer but not when it is asked for an answer" in str(caught.value)


# ------------------------------------------------------------------------------------------------------- the date


def test_a_run_keeps_its_date(made: Make, tmp_path: Path) -> None:
    """Breaks when a template with today's date gives the same data other tokens, or another key, on another day."""
    path = tmp_path / "own.jinja"
    path.write_text("{{ strftime_now('%Y-%m-%d') }} " + DROPS, encoding="utf-8")
    rows = [ask("a", "b")]
    first = made(rows, template=str(path), now="2026-11-21")
    assert "2026-11-21" in first.renderer.tokenizer.decode(first.store[0].tokens)
    assert made(rows, template=str(path), now="2026-11-21").store.folder == first.store.folder
    assert made(rows, template=str(path), now="2026-11-22").store.folder != first.store.folder
    assert (
        made(rows, now="2026-11-21").store.folder
        == made(rows, now="2026-11-22").store.folder
        == made(rows).store.folder
    )
    with pytest.raises(RecipeError, match="the date 'yesterday'; a date such as"):
        made(rows, now="yesterday")


def test_no_process_is_left_when_the_tokens_are_made(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a finalizer has to end it later, where a request to stop would be printed and lost."""
    begun: list[int | None] = []
    plain = RenderProcess.close

    def close(self: RenderProcess) -> None:
        begun.append(self.pid)
        plain(self)

    monkeypatch.setattr(RenderProcess, "close", close)
    template = made([ask("one", "two")]).renderer.template
    assert begun[-1] is not None and template._process.pid is None
    assert "hello" in template.render([{"role": "user", "content": "hello"}])


def test_cached_tokens_need_no_process(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [ask("one", "two"), ask("three", "four")]
    before = made(rows)
    asked: list[str] = []
    plain = RenderProcess.compile
    monkeypatch.setattr(RenderProcess, "compile", lambda self, program: asked.append("") or plain(self, program))
    again = made(rows)
    assert again.store.folder == before.store.folder and not asked
    made([*rows, ask("five", "six")])
    assert len(asked) == 1
    # Whoever asks for a prompt has it, from a process that is started for that.
    assert again.renderer.template.knows_tools is before.renderer.template.knows_tools


def test_a_template_that_does_not_compile_is_told_once(made: Make, tmp_path: Path) -> None:
    """Breaks when it is compiled with the first rows, and told as if each of them were at fault."""
    path = tmp_path / "broken.jinja"
    path.write_text("{% if %}", encoding="utf-8")
    with pytest.raises(TemplateError, match="does not compile") as failure:
        made([ask("one", "two")], template=str(path))
    assert "rows" not in failure.value.received


def test_words_are_let_go_of_when_the_tokens_are_made(made: Make, tokenizer: Tokenizer) -> None:
    """Breaks when a run carries, for all of its time, what only the making of its tokens needs."""
    made([ask("one", "two")])
    assert tokenizer.words is not None and not tokenizer.words._known
