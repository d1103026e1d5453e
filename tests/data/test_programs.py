"""Which program an answer holds, and that reading one never runs or ends anything."""

from __future__ import annotations

import ast

import pytest

from luthier.data.programs import LONGEST, defined, parsed, program_in


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("x = 1", "x = 1"),
        ("Here:\n```python\nx = 1\n```\nDone.", "x = 1"),
        ("```\nx = 1\n```", "x = 1"),
        ("```py\nx = 1\n```\n```python\ny = 2\n```", "y = 2"),
        ("```python\nx = 1\n```\n```json\n{}\n```", "x = 1"),
        ("```json\n{}\n```", None),
        ("```python\nx = 1", "x = 1"),
        ("````python\ns = '''\n```\n'''\n````", "s = '''\n```\n'''"),
        ("~~~python\nx = 1\n~~~", "x = 1"),
        ("```python\n```", None),
        ("", None),
        ("  ```python\n  x = 1\n  ```", "  x = 1"),
    ],
)
def test_the_last_block_of_python_is_the_program(text: str, program: str | None) -> None:
    assert program_in(text) == program


@pytest.mark.parametrize(
    "program", ["def f(:", "\0", "x = '\ud800'", "(" * 5000, "-" * 100_000 + "1", "[" * 150 + "]" * 150, "a." * 50_000,
                "x" * (LONGEST + 1), "f'{" * 200]
)  # fmt: skip
def test_what_cannot_be_read_is_told_and_never_raised(program: str) -> None:
    """Breaks when nesting or odd letters end the one who reads."""
    assert isinstance(parsed(program), str | ast.Module)
    assert isinstance(parsed("def f(:"), str)


def test_defined_names_are_those_at_the_top() -> None:
    tree = parsed("import a.b, c as d\nfrom e import f\ndef g(): h = 1\nclass I: j = 2\nk = l, m = 1, 2\nn: int = 3")
    assert isinstance(tree, ast.Module)
    assert defined(tree) == {"a", "d", "f", "g", "I", "k", "l", "m", "n"}
