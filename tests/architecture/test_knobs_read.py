"""A knob that nobody reads is a promise nobody keeps: every declared field is read somewhere in the source."""

from __future__ import annotations

import ast

import pytest

from tests.architecture.source import Module, classes, field_name, fields, is_dataclass, knob_kinds, modules

CONFIGS = [
    *knob_kinds(),
    *(
        (module, kind)
        for module in modules()
        if module.name.startswith("luthier.recipes")
        for kind in classes(module)
        if is_dataclass(kind)
    ),
]
# Read by name in the text of a recipe, before there is an object.
READ_AS_TEXT = {"recipe": "it says which schema to use, so it is read from the mapping"}


def attributes_read() -> set[str]:
    """Every attribute that is read anywhere: `x.name`, and `name` in a class pattern."""
    found = set()
    for module in modules():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add(node.attr)
            elif isinstance(node, ast.MatchClass):
                found.update(node.kwd_attrs)
    return found


READ = attributes_read()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda pair: f"{pair[0].name}.{pair[1].name}")
def test_every_declared_field_is_read(config: tuple[Module, ast.ClassDef]) -> None:
    module, kind = config
    unread = [field_name(field) for field in fields(kind)
              if field_name(field) not in READ and field_name(field) not in READ_AS_TEXT]  # fmt: skip
    assert not unread, f"{module.shown}: {kind.name}: nothing reads {', '.join(unread)}; use it or remove it"


def test_the_exceptions_are_still_needed() -> None:
    declared = {field_name(field) for _, kind in CONFIGS for field in fields(kind)}
    assert set(READ_AS_TEXT) <= declared


def test_an_unread_knob_would_be_seen() -> None:
    assert "a_knob_that_nobody_reads" not in READ
    assert "rank" in READ
