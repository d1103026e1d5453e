"""Cells: names and programs are told from what can be none, and nothing of them is run."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.core.errors import DataError
from luthier.data.cells import name_of, program_of, text_of


@pytest.mark.parametrize(
    "program", ["def draw(seed): ...", "try:\n    import draw\nexcept ImportError:\n    draw = 1", "from x import *",
                "def draw(seed):\n    return [" + "1, " * 100_000 + "]"]
)  # fmt: skip
def test_a_program_may_get_its_name_from_anywhere(program: str) -> None:
    """Breaks when a program that runs is refused for how it defines what is called."""
    assert program_of({"inputs": program}, "inputs", "draw") == program


@pytest.mark.parametrize("value", [None, 5, ["def draw(): ..."], "", "def draw(:", "x = 1", "draw = '\0'"])
def test_what_can_be_no_such_program_is_refused(value: Any) -> None:
    """Breaks when a cell is found to be no program only by the process that is to run it."""
    with pytest.raises(DataError, match="inputs .*a Python program that defines draw|a text"):
        program_of({"inputs": value}, "inputs", "draw")


def test_names_and_texts() -> None:
    assert name_of({"f": "größe"}, "f") == "größe" and text_of({"t": ""}, "t") == ""
    for value in ("", "two words", "f()", 5, None):
        with pytest.raises(DataError, match="the name of a function"):
            name_of({"f": value}, "f")
    with pytest.raises(DataError, match="t is None; a text"):
        text_of({"t": None}, "t")
