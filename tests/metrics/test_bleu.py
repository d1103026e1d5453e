"""BLEU against the formula counted out, with another number of references for each answer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import pytest

from luthier.core import optional
from luthier.core.errors import MissingError
from luthier.metrics.bleu import Bleu

ANSWERS = [
    "the fork is a cheap place by the river , for families",
    "aromi is in the city centre",
    "a pub near the old mill , it is not cheap",
]
REFERENCES = [
    ["the fork is a place by the river", "families like the fork , which is cheap", "cheap food by the river"],
    ["aromi is a pub in the city centre"],
    ["there is a pub near the old mill", "it is a cheap pub near the mill , it is nice"],
]


def counted(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The formula of the paper, for texts that are words with blanks between them."""
    hits, totals, said, near = [0] * 4, [0] * 4, 0, 0
    for answer, known in zip(answers, references, strict=True):
        words, others = answer.split(), [one.split() for one in known]
        said += len(words)
        near += min((abs(len(one) - len(words)), len(one)) for one in others)[1]
        for n in range(1, 5):
            grams = [Counter(tuple(text[at : at + n]) for at in range(len(text) - n + 1)) for text in (words, *others)]
            most = grams[1]
            for more in grams[2:]:
                most |= more
            hits[n - 1] += sum((grams[0] & most).values())
            totals[n - 1] += sum(grams[0].values())
    precision = math.exp(sum(math.log(hit / total) for hit, total in zip(hits, totals, strict=True)) / 4)
    return 100 * math.exp(min(0.0, 1 - near / said)) * precision


def test_it_is_the_formula_with_all_references() -> None:
    """Breaks when only the first reference counts, an answer with fewer of them is padded by empty ones, or the scale
    or the tokens are others."""
    pytest.importorskip("sacrebleu")
    found = Bleu().of(ANSWERS, REFERENCES)
    assert found == pytest.approx(counted(ANSWERS, REFERENCES), rel=1e-9)
    first = [known[:1] for known in REFERENCES]
    assert Bleu().of(ANSWERS, first) == pytest.approx(counted(ANSWERS, first), rel=1e-9) and found > 1.05 * counted(
        ANSWERS, first
    )


def test_capitals_and_tokens_are_knobs() -> None:
    """Breaks when a knob is not handed on."""
    pytest.importorskip("sacrebleu")
    loud = [answer.upper() for answer in ANSWERS]
    assert Bleu().of(loud, REFERENCES) < 5
    assert Bleu(lowercase=True).of(loud, REFERENCES) == pytest.approx(Bleu().of(ANSWERS, REFERENCES))
    said, known = ["by the river, for us all"], [["by the river , for us all"]]
    assert Bleu().of(said, known) == pytest.approx(100.0) and Bleu(tokenize="none").of(said, known) < 60


def test_without_the_package_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a comparison trains for an hour before it finds out."""

    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(optional.importlib, "import_module", absent)
    with pytest.raises(MissingError, match=r"BLEU needs the package sacrebleu.*luthier\[metrics\]"):
        Bleu().require()
