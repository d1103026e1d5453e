"""Bounds that hold whatever the data is: memory, the length of a value, and patience with a template."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from luthier.core.errors import TemplateError
from luthier.data import prepare as prepare_module
from luthier.data import row_log
from luthier.data.conversation import Row, Text
from luthier.data.intake import Intake
from luthier.data.prepare import Reading, make_renderer, prepare
from luthier.data.reading import json_list
from luthier.data.reading.rows import SourceFile
from luthier.data.rendering import process as render_process
from luthier.data.rendering.causal import CausalRenderer
from luthier.data.rendering.counts import RenderCounts
from luthier.data.rendering.process import RenderProcess
from luthier.data.rendering.template import Template, Wanted
from luthier.data.row_log import demand_readable
from luthier.data.tokenizer import Tokenizer
from tests.data.conftest import build
from tests.data.taken import take
from tests.tiny import tiny_tokenizer

WORDS = "the quick brown fox jumps over the lazy dog "


def peak(work: Callable[[], object]) -> int:
    """The most memory that Python objects took while `work` ran; what it returns is kept until then."""
    tracemalloc.start()
    try:
        result = work()
        return tracemalloc.get_traced_memory()[1] if result is not tracemalloc else 0
    finally:
        tracemalloc.stop()


def rows(path: Path, count: int, *, characters: int) -> Path:
    text = WORDS * (characters // len(WORDS) + 1)
    path.write_text("".join(json.dumps({"text": f"{n} {text}"}) + "\n" for n in range(count)), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------------- memory


def test_reading_holds_one_row_at_a_time(tmp_path: Path) -> None:
    """Breaks when memory grows with the file. The control, which keeps what it reads, does grow."""
    few, many = (rows(tmp_path / f"{count}.jsonl", count, characters=5000) for count in (50, 1000))
    demand_readable([SourceFile(few)])
    before = peak(lambda: demand_readable([SourceFile(few)]))
    assert peak(lambda: demand_readable([SourceFile(many)])) - before < 200_000
    assert peak(lambda: take(SourceFile(many))) - before > 4_000_000


def test_rows_are_kept_up_to_a_size_and_no_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when rows that are to be read once fill the memory, or are fewer than those of the file."""
    few, many = (rows(tmp_path / f"{count}.jsonl", count, characters=5000) for count in (20, 1000))
    read = demand_readable([SourceFile(few)], keep=200_000)
    assert read is not None and len(read.rows) == 20
    assert [row.content for _, row in read.rows] == [one.content for one in take(SourceFile(few)).rows]
    before = peak(lambda: demand_readable([SourceFile(few)]))
    assert peak(lambda: demand_readable([SourceFile(many)], keep=200_000)) - before < 500_000
    assert demand_readable([SourceFile(many)], keep=200_000) is None
    monkeypatch.setattr(row_log, "_KEPT_ROWS", 19)
    assert demand_readable([SourceFile(few)], keep=200_000) is None


def test_a_row_leaves_a_few_numbers_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when preparing keeps texts or tokens: a million rows would not fit. The control keeps them."""
    monkeypatch.setattr(prepare_module, "KEPT_CHARACTERS", 0)
    tokenizer = Tokenizer.of(tiny_tokenizer())
    renderer, _ = make_renderer(tokenizer, Reading())
    found, control = {}, {}
    for count in (10, 600, 1100):
        path = rows(tmp_path / f"{count}.jsonl", count, characters=150)
        found[count] = peak(lambda path=path: prepare(path, tokenizer, Reading(), fraction=0.1, cache=tmp_path / "c"))  # type: ignore[misc]
        control[count] = peak(lambda path=path: list(Intake([SourceFile(path)], renderer)))  # type: ignore[misc]
    # Rows are kept until they are rendered where they are few; here none is.
    # Both counts are enough that batches of rows are as large as they get.
    assert (found[1100] - found[600]) / 500 < 1000 < (control[1100] - control[600]) / 500


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_value_that_ends_within_what_is_held_is_still_too_long(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when a row of a list may be twice as long as the limit says, or hides the row behind it."""
    monkeypatch.setattr(json_list, "MAX_VALUE", 5000)
    monkeypatch.setattr("luthier.data.reading.text_files.PIECE_BYTES", 4096)
    good = {"text": "a"}
    path = tmp_path / name
    path.write_text(json.dumps([good, {"text": "b" * 4900}, {"text": "c" * 5001}, good]), encoding="utf-8")
    if name == "rows.jsonl":
        path.write_text(path.read_text("utf-8").replace("[", "[\n", 1), encoding="utf-8")
    found = take(SourceFile(path))
    (error,) = found.rejects
    assert (found.read, found.kept) == (4, 3) and "longer than 5,000 characters" in error.received
    before, _, line = path.read_text("utf-8").partition('{"text": "c')[0].rpartition("\n")
    assert error.where == f"{path}:{2 if before else 1}:{len(line) + 1}"


# ------------------------------------------------------------------------------------------------------- templates


@pytest.fixture
def process() -> Iterator[RenderProcess]:
    made = RenderProcess()
    yield made
    made.close()


DOUBLES = (
    "{% set ns = namespace(x='ab') %}{% if messages[0].bomb %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}"
    "{% endfor %}{% endif %}{{ ns.x }}"
)


def test_a_template_that_always_reaches_a_limit_is_given_up(
    process: RenderProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when a million rows are rendered by a template that takes half a second to fail for each."""
    monkeypatch.setattr(render_process, "MOST_LOST", 2)
    template = Template(DOUBLES, {}, name="bomb", process=process)
    bomb, good = Wanted([{"bomb": True}]), Wanted([{"bomb": False}])
    asked: list[int] = []
    plain = RenderProcess._render

    def counted(*given: object) -> None:
        asked.append(1)
        plain(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(RenderProcess, "_render", counted)
    # A text between two of them shows that the template works.
    made = template.render_many([bomb, good, bomb, good])
    assert [isinstance(one, str) for one in made] == [False, True] * 2
    asked.clear()
    made = template.render_many([bomb] * 5 + [good])
    assert len(asked) == 2 and all(isinstance(one, TemplateError) for one in made)
    assert "characters" in str(made[1]) and "reached a limit 2 times in a row; it is not asked again" in str(made[2])
    other = Template(DOUBLES + ".", {}, name="other", process=process)
    assert other.render([{"bomb": False}]) == "ab."


def test_a_conversation_that_no_template_could_show_is_not_blamed_on_the_template(
    process: RenderProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when somebody is sent to look for another template because of one endless row."""
    monkeypatch.setattr(render_process, "MAX_REQUEST", 2000)
    monkeypatch.setattr(render_process, "_AT_ONCE", 1000)
    template = Template("{{ messages[0].content }}", {}, name="good", process=process)
    short, long = Wanted([{"content": "a"}]), Wanted([{"content": "b" * 2000}])
    made = template.render_many([short, long, short])
    assert made[0] == made[2] == "a"
    error = made[1]
    assert isinstance(error, TemplateError) and error.allowed.startswith("at most 2,000")
    assert "characters of JSON" in error.received and "data.template" not in error.do and "the row" in error.do


# ------------------------------------------------------------------------------------------------------- small things


def test_a_copy_of_the_counts_has_all_of_them() -> None:
    """Breaks when a count is added, or their order changes, and the copy that a refused row falls back to lacks it."""
    counts = RenderCounts(1, 2, 3, 4, 5, 6, 7, {"a": 8}, {"a": ("b", "c")})
    copied = counts.copy()
    assert asdict(copied) == asdict(counts)
    counts.notice("a", ("", ""))
    counts.notice("d", ("", ""))
    assert copied.notices == {"a": 8} and set(copied.examples) == {"a"}


def test_a_text_that_is_only_the_mark_of_its_beginning_and_end() -> None:
    """Breaks when a text that begins with BOS gets a second one, or one that is only BOS is not trained at all."""
    tokenizer = build("bytes", bos="<s>", eos="<s>")
    template = Template("{{ messages }}", {}, name="none")
    for text in ("<s>", ""):
        (view,) = CausalRenderer(tokenizer, template).render(Row(0, "rows.txt:1:1", Text(text)))
        assert view.tokens.tolist() == [tokenizer.bos_id] * 2 and view.weights.tolist() == [0, 1]
    (view,) = CausalRenderer(tokenizer, template).render(Row(0, "rows.txt:1:1", Text("<s>the dog")))
    assert [index for index, token in enumerate(view.tokens) if token == tokenizer.bos_id] == [0, len(view.tokens) - 1]
