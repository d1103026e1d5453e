"""What C++ works out of rows is what Python does, row for row; of all else it says that it does not know."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace

import numpy as np
import pytest

from luthier.data.checks import _sound_turns, check_rendered
from luthier.data.conversation import Conversation, Message, Row
from luthier.data.findings import SHORT, Watch, digests
from luthier.data.rendering import renderer as renderer_module
from luthier.data.rendering.causal import CausalRenderer
from luthier.data.rendering.rendered import Rendered
from luthier.data.rendering.template import Template
from luthier.kernels.native_build import COMPILERS
from luthier.kernels.rows import NativeRows, Rows
from luthier.kernels.words import NativeSpellings, compiled
from tests.data.conftest import build

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ["Paris", "is", "THE", "it's", "12", "\n\n", "\t", "a\x1cb", "(x)", "end.", "\r\n", "   "]
ODD = ["caf\u00e9", "\u4e2d\u6587", "\u0130STANBUL\u3000", "\U0001f600", *WORDS, ""]
MARK = "<|im_end|>"

pytestmark = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="there is no compiler")


def talks(seed: int, count: int = 50) -> list[Row]:
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        messages: list[Message] = []
        for turn in range(draw.randint(1, 3)):
            for role in ("user", "assistant"):
                said = " ".join(draw.choices([*WORDS, *ODD] if draw.random() < 0.3 else WORDS, k=draw.randint(1, 40)))
                said += MARK * (draw.random() < 0.01)
                weight = draw.choice([None, None, None, 0.0, 0.5, 1e39]) if role == "assistant" else None
                messages.append(Message(role, said.strip() or f"word {turn}", weight))
        rows.append(Row(number, f"rows.jsonl:{number + 1}:1", Conversation(tuple(messages))))
    return rows


class Ways:
    """Two renderers alike, of which one asks C++, and the views that both make of rows."""

    def __init__(self, tokenizers, train_on: str = "answers") -> None:
        self.python, self.native = (
            CausalRenderer(tokenizer, Template(CHATML, tokenizer.special_tokens, name="test"), train_on=train_on)
            for tokenizer in tokenizers
        )
        self.native._rows = NativeRows.build()
        spellings = self.native.tokenizer.spellings
        assert spellings is not None
        spellings._native = NativeSpellings.build()

    def made(self, row: Row) -> tuple[object, object]:
        found = []
        for each in (self.python, self.native):
            staged = each.stage(row)
            each.foresee([staged])
            each.encode_ahead([staged])
            with np.errstate(over="ignore"):  # a weight too large is infinite, and refused for that
                found.append(each.finish(staged))
        return found[0], found[1]


CASES = {
    "no BOS": {"adds_bos": False, "eos": "<|im_end|>"},
    "last answers": {"adds_bos": True, "eos": "<|im_end|>"},
    "a stop token that is found": {"adds_bos": True, "eos": "</s>"},
}


@pytest.fixture(params=CASES)
def ways(request: pytest.FixtureRequest) -> Ways:
    train_on = "last" if request.param == "last answers" else "answers"
    return Ways([build(**CASES[request.param]) for _ in range(2)], train_on)


def same(one: Rendered, two: Rendered) -> bool:
    names = ("tokens", "weights", "roles", "spans")
    pairs = [(getattr(one, name), getattr(two, name)) for name in names]
    return one.text == two.text and all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("seed", range(2))
def test_rows_become_the_same_views_digests_and_answers(ways: Ways, seed: int) -> None:
    """Breaks when a role, a weight, a digest, an error or a count of answers differs between the two ways."""
    watches = [Watch(each) for each in (ways.python, ways.native)]
    known = 0
    for row in talks(seed):
        ours, theirs = ways.made(row)
        if not (isinstance(ours, list) and isinstance(theirs, list)):
            assert str(ours) == str(theirs)
            continue
        assert len(ours) == len(theirs) and all(map(same, ours, theirs))
        assert digests(ours) == digests(theirs, ways.native.native_rows)
        for watch, views in zip(watches, (ours, theirs), strict=True):
            watch.see(row.where, views)
        for view in theirs:
            problems = [check_rendered(view, each, row) for each in (ways.python, ways.native)]
            assert problems[0] == problems[1]
            known += _sound_turns(view, ways.native) is not None
    assert watches[0].answers == watches[1].answers and watches[0].answers.trained > 20
    assert ways.python.counts == ways.native.counts and ways.python.stop_ids == ways.native.stop_ids
    assert known > 12, "C++ knows what most rows are"


def spoiled(view: Rendered, draw: random.Random) -> Rendered:
    """The view with one thing wrong with it, or with what C++ does not look at."""
    at = draw.randrange(len(view.tokens))
    tokens, weights, spans = view.tokens.copy(), view.weights.copy(), view.spans.copy()
    match draw.randrange(10):
        case 0:
            tokens[at] = tokens[draw.randrange(len(tokens))]
        case 1:
            weights[at] = draw.choice([np.nan, np.inf, -1.0, 0.0, 1.0, 2.5])
        case 2:
            weights[:] = 0
        case 3:
            spans[at] = spans[draw.randrange(len(spans))]
        case 4:
            weights[0] = 1
        case 5:
            tokens[at] = next(iter(draw.sample([int(each) for each in view.tokens], 1)))
        case 6:
            return replace(view, text=view.text[:-1])
        case 7:
            return replace(view, weights=weights[:-1])
        case 8:
            spans[at] += 5
        case 9:
            return replace(view, text=view.text[:-3] + "\ud800" + view.text[-2:])
    return replace(view, tokens=tokens, weights=weights, spans=spans)


def test_what_is_wrong_with_a_row_is_said_as_ever(ways: Ways) -> None:
    """Breaks when C++ calls a row sound in which Python finds something."""
    draw, told = random.Random(1), 0
    for row in talks(5, 30):
        _, made = ways.made(row)
        for view in made if isinstance(made, list) else []:
            for _ in range(30):
                broken = spoiled(view, draw)
                ours, theirs = (check_rendered(broken, each, row) for each in (ways.python, ways.native))
                assert ours == theirs
                told += bool(ours)
                if len(broken.weights) == len(broken.tokens):
                    assert digests([broken]) == digests([broken], ways.native.native_rows)
    assert told > 150


def test_answers_that_may_show_nothing_are_looked_at_in_python(ways: Ways) -> None:
    """Breaks when a long answer of control tokens alone is counted as one that says something."""
    rows, tokenizer = ways.native.native_rows, ways.native.tokenizer
    assert rows is not None
    stop = next(iter(tokenizer.stop_ids))
    special = next(iter(tokenizer.special_ids - tokenizer.stop_ids))
    word = next(token for token in range(10**4) if token not in tokenizer.special_ids)

    def answered(*ids: int) -> int:
        tokens = np.array([word, *ids], np.int32)
        weights = np.ones(len(tokens), np.float32)
        weights[0] = 0
        one = Rows.of(tokens, np.zeros((len(tokens), 2), np.int32), weights)
        assert one is not None
        return rows.answer(one, tokenizer.stop_ids, tokenizer.special_ids)[0]

    assert answered(*[word] * 20, stop) == 20 > SHORT
    assert answered(*[special] * 20, stop) == -1 and answered(*[special] * 20, word, stop) == 21
    assert answered(*[word] * 20) == -1 and answered(word, stop, word, stop) == -1 and answered() == -1


def test_it_is_asked_once_there_are_many_rows(make_tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when few rows wait for it, many rows never get it, or LUTHIER_KERNELS=torch does not turn it off."""
    compiled()
    monkeypatch.setattr(renderer_module, "_LOOK", 3)
    for kernels, there in (("auto", True), ("torch", False)):
        monkeypatch.setenv("LUTHIER_KERNELS", kernels)
        tokenizer = make_tokenizer("bytes")
        made = CausalRenderer(tokenizer, Template(CHATML, tokenizer.special_tokens, name="test"))
        found = []
        for row in talks(2, 5):
            with np.errstate(over="ignore"):
                made.render(row)
            found.append(made.native_rows is not None)
        assert found == [False, False, there, there, there]
