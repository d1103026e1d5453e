"""Every method is one file with one class, a complete card, a test, and fields that explain themselves."""

from __future__ import annotations

import ast

import pytest

from luthier.core import catalog
from tests.architecture.source import (
    REPOSITORY,
    Module,
    bases,
    classes,
    contracts,
    families,
    field_name,
    fields,
    knob_kinds,
    methods,
    modules,
)

METHODS = [(family, module) for family in families() for module in methods(family) if module.path.stem != "__init__"]
every_method = pytest.mark.parametrize(
    ("family", "module"), METHODS, ids=[f"{family}.{module.path.stem}" for family, module in METHODS]
)


def test_the_catalog_sees_what_is_there() -> None:
    assert catalog.families() == families()
    assert {"adapters", "objectives", "optimizers", "schedules"} <= set(families())
    for family in families():
        assert catalog.names(family) == sorted(
            module.path.stem for owner, module in METHODS if owner == family
        ), f"{family}: names of the catalog and files differ"


@every_method
def test_a_method_file_holds_exactly_one_method(family: str, module: Module) -> None:
    known = {kind.name for kind in contracts(family)}
    found = [kind.name for kind in classes(module) if bases(kind) & known]
    assert len(found) == 1, f"{module.shown} holds {len(found)} classes made from {', '.join(known)}: {found}"


@every_method
def test_a_card_is_complete(family: str, module: Module) -> None:
    card = catalog.card(family, module.path.stem)
    missing = [key for key in catalog.CARD_KEYS if not card.sections.get(key)]
    assert card.title, f"{module.shown}: the docstring has no title"
    assert not missing, f"{module.shown}: the card lacks {', '.join(missing)}; each starts a line, as in `Idea: ...`"
    if family not in ("schedules",):
        assert ":" in card.title, f"{module.shown}: the title says name and meaning, as in `LoRA: low-rank updates ...`"


@every_method
def test_a_method_has_its_test(family: str, module: Module) -> None:
    path = REPOSITORY / "tests" / family / f"test_{module.path.stem}.py"
    assert path.is_file(), f"{module.shown} needs {path.relative_to(REPOSITORY)}"


@pytest.mark.parametrize("family", families())
def test_a_contract_is_short(family: str) -> None:
    module = next(module for module in modules() if module.name == f"luthier.{family}")
    assert module.lines <= 130, f"{module.shown} has {module.lines} lines; a contract has at most 130"


@pytest.mark.parametrize("kind", knob_kinds(), ids=lambda pair: f"{pair[0].name}.{pair[1].name}")
def test_every_field_explains_itself(kind: tuple[Module, ast.ClassDef]) -> None:
    module, node = kind
    silent = [field_name(field) for field in fields(node) if not _description(field.value)]
    assert not silent, f"{module.shown}: {node.name}: {', '.join(silent)} need Field(..., description=...)"


def _description(value: ast.expr | None) -> bool:
    if not isinstance(value, ast.Call) or not ast.unparse(value.func).endswith("Field"):
        return False
    texts = [keyword.value for keyword in value.keywords if keyword.arg == "description"]
    return any(not (isinstance(text, ast.Constant) and not text.value) for text in texts)
