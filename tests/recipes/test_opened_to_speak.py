"""What is opened to make text may be in another precision than it was trained in, unless one was asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier.model.language_model import LanguageModel
from luthier.recipes.opening import opened
from luthier.recipes.opening.opened import Opened, open_named
from luthier.recipes.opening.quantized import quantizer_named
from luthier.store.runs import RunDirectory


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Precision and purpose of each base that is loaded."""
    seen: list[tuple[str, bool]] = []
    load: Callable[..., LanguageModel] = opened.load_base

    def loaded(source: str, **knobs: Any) -> LanguageModel:
        seen.append((knobs["precision"], knobs["speaks"]))
        return load(source, **knobs)

    monkeypatch.setattr(opened, "load_base", loaded)
    return seen


def test_a_model_speaks_in_what_is_fastest_when_nobody_says_otherwise(asked: list[tuple[str, bool]]) -> None:
    open_named("seedling")
    open_named("seedling", speaks=True)
    open_named("seedling", speaks=True, precision="float32")
    assert asked == [("auto", False), ("auto", True), ("float32", False)]


def test_a_run_that_was_asked_for_float32_speaks_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a recipe's own word is passed over, or when evaluation asks in another precision than training."""
    purposes: list[bool] = []
    some = open_named("seedling")

    def noted(_: RunDirectory, asked: Any) -> Opened:
        purposes.append(asked.speaks)
        return some

    monkeypatch.setattr(opened, "_open_run", noted)
    for precision in ("auto", "float32"):
        with RunDirectory.begin(tmp_path / precision) as run:
            run.write_recipe({"model": "seedling", "precision": precision})
        open_named(str(run.folder))
        open_named(str(run.folder), speaks=True)
    open_named(str(tmp_path / "auto"), speaks=True, precision="float32")
    assert purposes == [False, True, False, False, False]


@pytest.mark.parametrize("quantizer", ["none", "int8"])
def test_what_was_packed_is_given_back(quantizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a model in eight bits keeps the memory of the one it was packed from."""
    released: list[bool] = []
    monkeypatch.setattr(opened.pool, "install", lambda: "")
    monkeypatch.setattr(opened.pool, "release", lambda: released.append(True))
    open_named("seedling", quantizer=quantizer_named(quantizer))
    assert released == [True] * (quantizer == "int8")
