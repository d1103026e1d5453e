"""Cells: texts, names and programs in the columns of a data row, as those who check answers need them.

Idea: what a cell holds is looked at before anything is trained, and nothing of it is run. So a program is only read:
whether it does what it should shows when it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.core.errors import DataError
from luthier.data.cases import shown
from luthier.data.programs import LONGEST, parsed


def text_of(facts: Mapping[str, Any], column: str) -> str:
    """The text in a column; it may be empty. Raises DataError for anything else."""
    value = facts[column]
    if not isinstance(value, str):
        raise DataError(f"{column} is {shown(value)}", allowed="a text")
    return value


def name_of(facts: Mapping[str, Any], column: str) -> str:
    """The name of a function in a column. Raises DataError for what is none."""
    value = facts[column]
    if not isinstance(value, str) or not value.isidentifier():
        raise DataError(f"{column} is {shown(value)}", allowed="the name of a function")
    return value


def program_of(facts: Mapping[str, Any], column: str, name: str) -> str:
    """The Python program in a column, in which `name` is defined. Raises DataError for what cannot be such a one."""
    allowed = f"a Python program that defines {name}"
    text = text_of(facts, column)
    # Longer ones are not looked at, and may run all the same.
    if len(text) <= LONGEST and isinstance(found := parsed(text), str):
        raise DataError(f"{column} is {shown(text)}: {found}", allowed=allowed)
    # A name may come from anywhere in a program, but not from one in which it does not stand.
    if name not in text and "import *" not in text:
        raise DataError(f"{column} says nowhere {name!r}", allowed=allowed)
    return text
