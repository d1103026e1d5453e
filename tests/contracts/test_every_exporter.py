"""What every exporter promises: the artefact is the model, whatever the architecture and whatever was folded in."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.core import catalog
from luthier.core.chosen import choose
from luthier.core.errors import MissingError, RecipeError
from luthier.exporters import Exporter, Subject
from luthier.model.parity import compare
from tests.exported import ARCHITECTURES, exported, heard, subject

METHODS = catalog.names("exporters")
MERGED = ("lora", "dora", "ia3", "sparse", "trainable_tokens", "full")
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
    assert report.tokens == 73 and report.agreement is not None and report.agreement >= 0.98
    assert (report.rows, report.rows_equal) in ((2, 2), (0, 0))
    assert str(tmp_path) not in made(name).usage(given)


@pytest.mark.parametrize("adapter", MERGED)
@pytest.mark.parametrize("name", [name for name in METHODS if name != "ollama"])  # its file is that of gguf
def test_whatever_weights_can_hold_is_in_them(name: str, adapter: str, tmp_path: Path) -> None:
    given = subject("qwen2", tmp_path, adapter=adapter)
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
