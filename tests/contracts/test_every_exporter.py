"""What every exporter promises: the artefact is the model, whatever the architecture and whatever was folded in."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.core import catalog
from luthier.core.chosen import choose
from luthier.core.errors import MissingError, RecipeError
from luthier.exporters import Exporter, Subject
from luthier.model.comparing.parity import compare
from tests.contracts.crossed import crossed
from tests.exported import ARCHITECTURES, exported, heard, subject

METHODS = catalog.names("exporters")
MERGED = tuple(name for name in catalog.names("adapters")
               if catalog.load("adapters", name).provides & {"mergeable", "trains-base"})  # fmt: skip
"""Adapters that weights can hold."""
EXACT: dict[str, dict[str, str]] = {"gguf": {"type": "F32"}, "ollama": {"type": "F32"}}
"""Knobs of forms that round by default: among the ties of random weights eight bits choose otherwise."""


def made(name: str) -> Exporter:
    return choose("exporters", Exporter, {"method": name, **EXACT.get(name, {})})


def able(name: str, given: Subject) -> Exporter:
    """The exporter, where it says that it can write this model."""
    exporter = made(name)
    try:
        exporter.require(given)
    except (MissingError, RecipeError) as failure:
        pytest.skip(str(failure))
    return exporter


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", METHODS)
def test_the_artefact_is_the_model(name: str, architecture: str, tmp_path: Path) -> None:
    """Breaks when a form loses a tensor, a bias, a scale, a setting of attention, the template or the end."""
    given = subject(architecture, tmp_path, adapter="lora")
    report = exported(able(name, given), given, tmp_path / "out")
    assert report.passed, report.findings
    assert report.tokens == 73 and report.greedy is not None and report.greedy.decided_agreement == 1
    assert (report.rows, report.rows_equal) in ((2, 2), (0, 0))
    assert str(tmp_path) not in made(name).usage(given)


@pytest.mark.parametrize(("adapter", "architecture"), crossed(MERGED, ARCHITECTURES, always=("llama", "gpt2")))
def test_whatever_weights_can_hold_is_in_them(architecture: str, adapter: str, tmp_path: Path) -> None:
    """Breaks when an adapter is folded in on one architecture's layers only, or not as it was computed."""
    given = subject(architecture, tmp_path, adapter=adapter)
    report = exported(made("merged"), given, tmp_path / "out")
    assert report.passed, report.findings
    assert report.max_difference < 1e-4 * report.spread and report.as_dict()["agreement"] == 1
    assert report.tokens == 73 and report.rows == report.rows_equal == 2


OTHER_FORMS = [
    pytest.param(architecture, name, marks=() if architecture == "qwen2" else pytest.mark.slow)
    for architecture in ARCHITECTURES
    for name in METHODS
    if name not in ("merged", "ollama")  # the file of ollama is that of gguf
]


@pytest.mark.parametrize("adapter", MERGED)
@pytest.mark.parametrize(("architecture", "name"), OTHER_FORMS)
def test_other_forms_hold_it_too(architecture: str, name: str, adapter: str, tmp_path: Path) -> None:
    given = subject(architecture, tmp_path, adapter=adapter)
    report = exported(able(name, given), given, tmp_path / "out")
    assert report.passed, report.findings


@pytest.mark.parametrize("name", METHODS)
def test_another_model_is_seen(name: str, tmp_path: Path) -> None:
    """Breaks when the side that reads an artefact looks at the source instead."""
    given, other = subject("llama", tmp_path, adapter="lora"), subject("llama", tmp_path / "other")
    exporter = able(name, given)
    assert exported(exporter, given, tmp_path / "out").passed
    side = exporter.read(given, tmp_path / "out")
    assert not compare(heard(other), side, exporter.tolerance(given)).passed
