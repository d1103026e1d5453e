"""Knobs that are read from files: what pydantic says of them, for every method there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.core import catalog
from luthier.core.told_knobs import imported_knobs, read_knobs, told_knobs

EVERY = [(family, name) for family in catalog.families() for name in catalog.names(family)]


def test_knobs_read_from_files_are_those_of_the_classes() -> None:
    """Breaks when `luthier describe` tells another default, order or meaning than a recipe would get."""
    for family, name in EVERY:
        assert told_knobs(family, name) == imported_knobs(family, name), f"{family}/{name}"
    read = [each for each in EVERY if read_knobs(catalog.source(*each)) is not None]
    # A default that a function makes is for the class to tell.
    assert set(EVERY) - set(read) <= {("objectives", "mixture")}
    kinds = {knob.name: knob for knob in told_knobs("rewards", "ladder")}
    assert kinds["rungs"].required and kinds["rungs"].default is None


@pytest.mark.parametrize("line", ['x: int = Field(2 * 3, description="d")', "x: int = 3", "x: int", "",
                                  'x: dict = Field(default_factory=lambda: {}, description="d")'])  # fmt: skip
def test_what_is_not_plain_is_left_to_the_class(tmp_path: Path, line: str) -> None:
    base = "luthier.core.knobs import Method" if line else "elsewhere import Method"
    (tmp_path / "one.py").write_text(f"from {base}\nclass One(Method):\n    {line or 'pass'}\n", "utf-8")
    assert read_knobs(tmp_path / "one.py") is None
