"""What every metric of the catalog promises."""

from __future__ import annotations

import pytest

from luthier.core import catalog
from luthier.core.chosen import choose
from luthier.core.errors import DataError
from luthier.metrics import Metric

REFERENCES = [
    ["The first answer has five words", "Another one says it otherwise"],
    ["The second answer is somewhat longer than that"],
    ["A third is there too , to be sure"],
]
PERFECT = [known[-1] for known in REFERENCES]


@pytest.fixture(params=catalog.names("metrics"))
def metric(request: pytest.FixtureRequest) -> Metric:
    name = str(request.param)
    if name == "bleu":
        pytest.importorskip("sacrebleu")
    return choose("metrics", Metric, name)


def test_references_get_the_most_and_nothing_gets_nothing(metric: Metric) -> None:
    """Breaks when the scale is not what it says, or only the first reference counts."""
    assert metric.of(PERFECT, REFERENCES) == pytest.approx(metric.perfect)
    assert metric.of([""] * 3, REFERENCES) == 0.0


def test_worse_answers_get_less_whatever_their_order(metric: Metric) -> None:
    """Breaks when a metric looks at where an answer stands, or a wrong one changes nothing."""
    mixed = [PERFECT[0], "something else altogether", PERFECT[2]]
    found = metric.of(mixed, REFERENCES)
    assert 0.0 < found < metric.perfect
    assert metric.of(mixed[::-1], REFERENCES[::-1]) == pytest.approx(found)


def test_what_cannot_be_judged_is_refused(metric: Metric) -> None:
    """Breaks when no answers at all, or a question without a reference, give a number."""
    metric.require()
    for answers, references, part in (([], [], "no answer"), (["a"], [], "1 answers, 0"), (["a"], [[]], "question 0")):
        with pytest.raises(DataError, match=part):
            metric.of(answers, references)
