"""What every probe of the catalog promises, of a low-rank and of a whole change, on architectures that differ."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from luthier.core import catalog
from luthier.core.chosen import choose
from luthier.core.errors import NumericError
from luthier.model.comparing.pair import Pair
from luthier.model.load import state_digest
from luthier.probes import Probe
from tests.pairs import full_pair, lora_pair

NAMES = catalog.names("probes")
each = pytest.mark.parametrize("name", NAMES)
KINDS = pytest.mark.parametrize(("make", "kind"), [(lora_pair, "llama"), (lora_pair, "gpt2"), (full_pair, "llama"),
                                                   (full_pair, "gpt2")])  # fmt: skip
Make = Callable[..., tuple[Pair, Any]]


def probe(name: str) -> Probe:
    return choose("probes", Probe, name)


def numbers(value: Any) -> Iterator[float]:
    """Every number in a report."""
    if isinstance(value, dict):
        for inner in value.values():
            yield from numbers(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from numbers(inner)
    elif isinstance(value, int | float):
        yield value


@each
@KINDS
def test_a_report_is_data_and_changes_nothing(name: str, make: Make, kind: str) -> None:
    """Breaks when a report holds tensors or numbers that are none, or a probe leaves a trace in a model."""
    pair, model = make(kind)
    before = state_digest(model.module)
    implementation = model.module.config._attn_implementation
    report = probe(name).of(pair)
    assert state_digest(model.module) == before
    assert model.module.config._attn_implementation == implementation
    assert all(attachment.enabled for attachment in model.attachments.values())
    held = report.as_dict()
    assert json.loads(json.dumps(held, allow_nan=False)) == json.loads(json.dumps(held))
    assert all(math.isfinite(one) for one in numbers(held)), name
    assert report.verdict and all(sentence.endswith((".", "!")) for sentence in report.verdict)
    assert all(len(row) == len(table.heads) for table in report.tables for row in table.rows)
    assert all(len(row) == len(grid.columns) for grid in report.grids for row in grid.values)
    assert all(len(grid.rows) == len(grid.values) for grid in report.grids)
    if report.measured:
        assert report.numbers
    # An alpha is a LoRA's.
    assert report.measured == (name != "alpha_rank" or make is lora_pair)


@each
@pytest.mark.parametrize("make", [lora_pair, full_pair])
def test_no_change_is_told_as_none(name: str, make: Make) -> None:
    """Breaks when a change of zero gets a number that says it was one."""
    pair, _ = make("llama", std=0.0)
    report = probe(name).of(pair)
    if "weights" in probe(name).needs:
        assert "No weight differs" in report.verdict[0]
        assert not any(value for value in report.numbers.values())
    assert all(math.isfinite(one) for one in numbers(report.as_dict()))


@each
def test_what_is_not_there_is_said_and_not_measured(name: str) -> None:
    """Breaks when a probe makes a report of nothing, or fails where it should say what it lacks."""
    pair, _ = lora_pair("llama")
    bare = replace(pair, changes=(), texts=(), samples=(), gradients=None, settings={}, beside=("LearnedPrompt",))
    report = probe(name).of(bare)
    assert not report.measured and not report.numbers
    if "weights" in probe(name).needs:
        assert "LearnedPrompt" in report.verdict[0]


@each
def test_the_same_pair_gives_the_same_report(name: str) -> None:
    """Breaks when something random has no seed."""
    pair, _ = lora_pair("llama")
    assert probe(name).of(pair).as_dict() == probe(name).of(pair).as_dict()
    assert probe(name).flops(pair) >= 0


@pytest.mark.parametrize("name", [name for name in NAMES if "weights" in probe(name).needs])
def test_broken_weights_are_an_error_and_no_finding(name: str) -> None:
    """Breaks when NaN in a tuned weight becomes a count or a picture."""
    pair, _ = lora_pair("llama")
    down, up = pair.changes[0].factors or ((), ())
    broken = replace(pair.changes[0], factors=(down, up * math.nan))
    with pytest.raises(NumericError, match="NaN"):
        probe(name).of(replace(pair, changes=(broken, *pair.changes[1:])))
