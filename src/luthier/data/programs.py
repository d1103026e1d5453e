"""The program in an answer: the last fenced block of Python, or the whole answer where nothing is fenced.

Idea: models write programs between fences, with words around them. A block that names another language is no program of
ours. Of several the last counts, as of several final answers. A fence that is not closed ends with the answer.
"""

from __future__ import annotations

import ast
import re
from typing import Final

_FENCE: Final = re.compile(r"^[ \t]*(```+|~~~+)[ \t]*([\w+-]*)[^\n]*$", re.MULTILINE)
_OURS: Final = ("", "python", "python3", "py")
LONGEST: Final = 200_000
"""Characters of a program that is looked at; longer ones are no answer that anybody wants."""


def program_in(text: str) -> str | None:
    """The program of an answer; None where it has none."""
    fences = list(_FENCE.finditer(text))
    if not fences:
        return text.strip() or None
    found, opened = None, None
    for fence in fences:
        if opened is None:
            opened = fence
        elif fence[1].startswith(opened[1]) and not fence[2]:
            found, opened = _inside(text, opened, fence.start()) or found, None
    if opened is not None:
        found = _inside(text, opened, len(text)) or found
    return found


def _inside(text: str, opened: re.Match[str], end: int) -> str | None:
    return text[opened.end() : end].strip("\n") or None if opened[2].lower() in _OURS else None


def parsed(program: str) -> ast.Module | str:
    """The syntax tree of a program, or why there is none. Nothing in it is run."""
    if len(program) > LONGEST:
        return f"a program of {len(program):,} characters; at most {LONGEST:,} are looked at"
    try:
        return ast.parse(program)
    except SyntaxError as failure:
        return f"line {failure.lineno}: {failure.msg}"
    except (ValueError, RecursionError, MemoryError) as failure:
        # A NUL, a lone surrogate, or nesting deeper than the parser's stack.
        return f"{type(failure).__name__}: {failure}"


def defined(tree: ast.Module) -> frozenset[str]:
    """The names that the top of a program defines: functions, classes, assignments, imports."""
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found.update((alias.asname or alias.name).partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found.update(name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))
    return frozenset(found)
