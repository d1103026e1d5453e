"""A small model, a small file, a recipe for them, and one finished run that many tests look at."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.commands import colour_rows, luthier, recipe_text


@pytest.fixture(scope="session")
def llama(tiny_path: Callable[[str], Path]) -> Path:
    return tiny_path("llama")


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colour_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory, llama: Path, rows: Path) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(recipe_text(llama, rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    """A finished, unbroken run of `recipe`. Read only."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    luthier("train", recipe, "--run", folder, "--json").must(0)
    return folder


@pytest.fixture
def copied(tmp_path: Path, llama: Path) -> Path:
    """A copy of the model that a test may spoil."""
    return Path(shutil.copytree(llama, tmp_path / "model"))
