"""The source as trees, read once: what all architecture tests look at. Nothing of luthier is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCE = REPOSITORY / "src"
PACKAGE = SOURCE / "luthier"


@dataclass(frozen=True)
class Module:
    """One file of the package."""

    name: str
    path: Path
    tree: ast.Module
    lines: int

    @property
    def shown(self) -> str:
        """The path as a reader would type it."""
        return self.path.relative_to(REPOSITORY).as_posix()

    @property
    def package(self) -> str:
        """The package that relative imports of the file start from."""
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]


@cache
def modules() -> tuple[Module, ...]:
    """Every Python file of the package."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text(encoding="utf-8")
        found.append(Module(name, path, ast.parse(text, str(path)), text.count("\n")))
    return tuple(found)


def folders() -> list[str]:
    """The top-level folders of the package that hold Python files."""
    return sorted({module.name.split(".")[1] for module in modules() if module.name.count(".")})


@cache
def families() -> tuple[str, ...]:
    """The folders whose `__init__.py` defines a subclass of Method: the same rule as the catalog's."""
    return tuple(folder for folder in folders() if contract(folder) is not None)


@cache
def contract(folder: str) -> ast.ClassDef | None:
    """The contract class of a family."""
    for module in modules():
        if module.name == f"luthier.{folder}" and module.path.name == "__init__.py":
            return next((kind for kind in classes(module) if "Method" in bases(kind)), None)
    return None


def contracts(family: str) -> list[ast.ClassDef]:
    """The contract class of a family, and those beside it that say more for some of its methods."""
    base = contract(family)
    module = next(module for module in modules() if module.name == f"luthier.{family}")
    return [] if base is None else [base, *(kind for kind in classes(module) if bases(kind) & {base.name})]


def methods(family: str) -> list[Module]:
    """The files of a family that hold a method."""
    return [module for module in modules()
            if module.path.parent == PACKAGE / family and not module.path.stem.startswith("_")]  # fmt: skip


def classes(module: Module) -> list[ast.ClassDef]:
    """The classes at the top of a file."""
    return [node for node in module.tree.body if isinstance(node, ast.ClassDef)]


def bases(kind: ast.ClassDef) -> set[str]:
    """The names of the classes it is made from, without their modules."""
    found = set()
    for base in kind.bases:
        inner = base.value if isinstance(base, ast.Subscript) else base
        found.add(inner.attr if isinstance(inner, ast.Attribute) else getattr(inner, "id", ""))
    return found


@cache
def knob_kinds() -> tuple[tuple[Module, ast.ClassDef], ...]:
    """Every class made from Knobs, directly or over others, wherever it stands."""
    known, found, grown = {"Knobs", "Method"}, {}, True
    while grown:
        grown = False
        for module in modules():
            for kind in classes(module):
                if (module.name, kind.name) not in found and bases(kind) & known:
                    found[module.name, kind.name] = (module, kind)
                    known.add(kind.name)
                    grown = True
    return tuple(found.values())


def is_dataclass(kind: ast.ClassDef) -> bool:
    """Whether a class is decorated as a dataclass."""
    return any("dataclass" in ast.unparse(decorator) for decorator in kind.decorator_list)


def fields(kind: ast.ClassDef) -> Iterator[ast.AnnAssign]:
    """The declared fields of a class: annotated names that are no class variables and not private."""
    for node in kind.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            annotation = ast.unparse(node.annotation)
            if not annotation.startswith(("ClassVar", "Final")) and not node.target.id.startswith("_"):
                yield node


def field_name(node: ast.AnnAssign) -> str:
    """The name a field declares."""
    return node.target.id if isinstance(node.target, ast.Name) else ""
