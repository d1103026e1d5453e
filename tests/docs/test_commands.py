"""Every command and each of its options is explained, and a page uses it. Help as typed: tests/cli/test_help.py."""

from __future__ import annotations

import re
from typing import Any

import pytest
import typer

from luthier.cli.main import app
from tests.docs.snippets import PAGES


def _leaves(group: Any, before: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    found = []
    for name, command in group.commands.items():
        inner = getattr(command, "commands", None)
        found += _leaves(command, (*before, name)) if inner else [((*before, name), command)]
    return found


COMMANDS = _leaves(typer.main.get_command(app))
each_command = pytest.mark.parametrize(("name", "command"), COMMANDS, ids=[" ".join(name) for name, _ in COMMANDS])


@each_command
def test_it_and_every_option_have_help_and_examples(name: tuple[str, ...], command: Any) -> None:
    assert re.match(r"[A-Z].*\.$", (command.help or "").split("\n")[0])
    assert (command.help or "").partition("Examples:")[2].count(f"luthier {' '.join(name)}") == 2
    for parameter in command.params:
        assert getattr(parameter, "help", None), f"luthier {' '.join(name)}: {parameter.name} has no help"


@each_command
def test_a_page_uses_it(name: tuple[str, ...], command: Any) -> None:
    text = "\n".join(page.read_text("utf-8") for page in PAGES)
    blocks = re.sub(r"<!-- begin commands -->.*?<!-- end commands -->", "", text, flags=re.DOTALL)
    assert re.search(rf"luthier {' '.join(name)}\b", blocks), f"no page shows luthier {' '.join(name)} in use"
