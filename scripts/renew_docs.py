"""Renew the generated blocks of README.md and docs/: tables that come from the code and must never drift from it.

What: everything between `<!-- begin NAME -->` and `<!-- end NAME -->` is written anew from the catalog, the recipe
schema, the data formats, the error tree and the command line. tests/docs/test_blocks.py says when that is due.

    python scripts/renew_docs.py            # write
    python scripts/renew_docs.py --check    # only tell which files are out of date
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import luthier
from luthier.cli.main import app
from luthier.core import catalog, errors
from luthier.core.chosen import Chosen
from luthier.data.formats import formats
from luthier.recipes.schemas.finetune import FinetuneRecipe
from luthier.recipes.schemas.reinforce import EngineKnobs, ReinforceRecipe, RolloutKnobs

HOME = Path(__file__).resolve().parent.parent
MARKED = re.compile(r"(<!-- begin (\w[\w-]*) -->\n)(.*?)(<!-- end \2 -->)", re.DOTALL)
WORDS = {"str": "text", "float": "number", "int": "whole number", "bool": "true or false", "NoneType": "empty"}


def pages() -> list[Path]:
    """README, CONTRIBUTING and every page of docs/."""
    return [HOME / "README.md", HOME / "CONTRIBUTING.md", *sorted((HOME / "docs").glob("*.md"))]


def renewed(text: str) -> str:
    """`text` with each of its generated blocks made anew. Raises KeyError for a block nobody makes."""
    return MARKED.sub(lambda match: f"{match[1]}{BLOCKS[match[2]]().rstrip()}\n{match[4]}", text)


def methods() -> str:
    """What the catalog holds."""
    rows = [
        (family, f"`{name}`", catalog.card(family, name).title.rstrip("."))
        for family in catalog.families()
        for name in catalog.names(family)
    ]
    return _table(("family", "method", "what it is"), rows)


def families() -> str:
    """Each family, what it decides, and the names of its methods."""
    rows = []
    for family in catalog.families():
        text = importlib.import_module(f"luthier.{family}").__doc__ or ""
        about = text.partition("\n")[0].partition(": ")[2].rstrip(".")
        rows.append((f"`{family}`", about, ", ".join(f"`{name}`" for name in catalog.names(family))))
    return _table(("family", "what it decides", "methods"), rows)


def commands() -> str:
    """Every command and the first sentence of its help."""
    rows = [(f"`luthier {name}`", (command.help or "").split("\n")[0]) for name, command in leaf_commands()]
    return _table(("command", "what it does"), rows)


def leaf_commands() -> Iterator[tuple[str, Any]]:
    """Every command that does something, with its full name."""

    def walk(group: Any, before: str) -> Iterator[tuple[str, Any]]:
        for name, command in group.commands.items():
            if getattr(command, "commands", None):
                yield from walk(command, f"{before}{name} ")
            else:
                yield f"{before}{name}", command

    yield from walk(typer.main.get_command(app), "")


def exit_codes() -> str:
    """The documented exit codes with the error codes that lead to them."""
    table = re.findall(r"^\| (\d+) \| (\w+) \| (.+) \|$", errors.__doc__ or "", re.MULTILINE)
    rows = [("0", "done, and what was promised was checked", "")]
    for number, _, meaning in table:
        codes = [f"`{kind.code}`" for kind in error_kinds() if kind.exit_code == int(number)]
        rows.append((number, meaning, ", ".join(codes)))
    rows.append(("130", "stopped by Ctrl-C outside of training", ""))
    return _table(("exit", "meaning", "error codes"), rows)


def error_kinds() -> list[type[errors.LuthierError]]:
    """Every error class with a code of its own, wherever it is defined, by exit code."""
    for found in pkgutil.walk_packages(luthier.__path__, "luthier."):
        importlib.import_module(found.name)

    def below(kind: type[errors.LuthierError]) -> Iterator[type[errors.LuthierError]]:
        yield kind
        for each in kind.__subclasses__():
            yield from below(each)

    ours = (kind for kind in below(errors.LuthierError) if kind.__module__.startswith("luthier."))
    # Classes of other files by their code: which file was imported first must not change a page.
    def order(kind: type[errors.LuthierError]) -> tuple[int, str]:
        return kind.exit_code, "" if kind.__module__ == errors.__name__ else kind.code

    return sorted((kind for kind in ours if "code" in vars(kind)), key=order)


def error_walk() -> str:
    """Every error: its code, how a command ends with it, its cause, and what to do next."""
    rows = []
    for kind in error_kinds():
        cause = (kind.__doc__ or "").partition("\n")[0]
        rows.append((f"`{kind.code}`", str(kind.exit_code), f"`{kind.__name__}`", cause, kind.advice))
    return _table(("code", "exit", "in Python", "cause", "next, unless the message says another"), rows)


def schema() -> str:
    """Every knob of a recipe, section by section, with the knobs of each method of a family."""
    lines = ["### The run", "", *_knobs(FinetuneRecipe, "", skip_sections=True)]
    for name, field in FinetuneRecipe.model_fields.items():
        if family := _family(field):
            lines += ["", f"### `{name}`: {field.description}", ""]
            lines += [f"`{name}: {{method: NAME, ...}}`; the default is `{_default(field)}`."]
            for method in catalog.names(family):
                kind = catalog.load(family, method)
                lines += ["", f"**`{method}`** — {catalog.card(family, method).title}", ""]
                lines += _knobs(kind, f"{name}.") if kind.model_fields else ["No knobs."]
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            lines += ["", f"### `{name}`: {field.description}", "", *_knobs(field.annotation, f"{name}.")]
    return "\n".join([*lines, *_rollouts()])


def _rollouts() -> list[str]:
    """What a recipe of reinforcement learning has beside a fine-tune: knobs, and the knobs of an engine among them."""
    field = ReinforceRecipe.model_fields["rollouts"]
    lines = ["", f"### `rollouts` of `recipe: reinforce`: {field.description}", ""]
    lines += _knobs(RolloutKnobs, "rollouts.", skip_sections=True)
    about = RolloutKnobs.model_fields["engine"].description
    return [*lines, "", f"**`rollouts.engine`** — {about}", "", *_knobs(EngineKnobs, "rollouts.engine.")]


def data_formats() -> str:
    """Every data format with an example row, the most specific first: the order of detection."""
    lines: list[str] = []
    for form in formats():
        text = " ".join((sys.modules[type(form).__module__].__doc__ or "").split())
        about = re.sub(r" (Source|Use when):", r"\n*\1:*", text)
        columns = ", ".join(f"`{column}`" for column in form.known)
        lines += [f"### `{form.name}`: {form.title}", "", about, "", f"Columns it goes by: {columns}.", ""]
        lines += ["```json", form.example, "```", ""]
    return "\n".join(lines)


BLOCKS: dict[str, Callable[[], str]] = {
    "methods": methods,
    "families": families,
    "commands": commands,
    "exit-codes": exit_codes,
    "errors": error_walk,
    "schema": schema,
    "formats": data_formats,
}


def _knobs(kind: type[BaseModel], before: str, *, skip_sections: bool = False) -> list[str]:
    rows = []
    for name, field in kind.model_fields.items():
        section = _family(field) or (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel))
        if not (skip_sections and section):
            rows.append((f"`{before}{name}`", _values(field), _default(field), field.description or ""))
    return _table(("key", "values", "default", "meaning"), rows).splitlines()


def _family(field: FieldInfo) -> str | None:
    return next((item.family for item in field.metadata if isinstance(item, Chosen)), None)


def _values(field: FieldInfo) -> str:
    """The values a field may have, in words: its type and its range."""
    if (family := _family(field)) is not None:
        return f"one of `{family}`, with its knobs"
    words = list(dict.fromkeys(_words(field.annotation)))
    marks = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    limits = [
        f"{mark} {getattr(item, key):g}"
        for item in field.metadata
        for key, mark in marks.items()
        if getattr(item, key, None) is not None
    ]
    return " or ".join(words) + (f", {' and '.join(limits)}" if limits else "")


def _words(annotation: Any) -> list[str]:
    inside = typing.get_args(annotation)
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _words(inside[0])
    if origin is typing.Literal:
        return [", ".join(f"`{value}`" for value in inside)]
    if origin is tuple:
        return ["a list of " + " or ".join(f"{word}s" for word in _words(inside[0]))]
    if origin in (dict, Mapping):
        return ["mapping"]
    if inside:
        return [word for part in inside for word in _words(part)]
    return [WORDS[annotation.__name__]]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "(needed)"
    value = field.get_default(call_default_factory=True, validated_data={})
    if (family := _family(field)) is not None:
        return next(name for name in catalog.names(family) if isinstance(value, catalog.load(family, name)))
    if value is None:
        return "(empty)"
    if isinstance(value, bool):
        return str(value).lower()
    return (", ".join(map(str, value)) or "(empty)") if isinstance(value, tuple) else str(value)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def main() -> int:
    """Renew or check; 1 when something was out of date and --check was given."""
    parser = argparse.ArgumentParser(description="renew the generated blocks of README.md and docs/")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when a page is out of date")
    check = parser.parse_args().check
    stale = [page for page in pages() if renewed(page.read_text("utf-8")) != page.read_text("utf-8")]
    for page in stale:
        if not check:
            page.write_text(renewed(page.read_text("utf-8")), encoding="utf-8")
        print(f"{'out of date' if check else 'renewed'}: {page.relative_to(HOME)}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
