"""Imports go down only, at any depth of a file, lazy and type-only ones included."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.architecture.source import Module, families, folders, modules

FLOORS: dict[str, float] = {
    "core": 1,
    "assets": 1.5,  # files and the little world they come from: core, and nothing else
    **dict.fromkeys(("maths", "arithmetic", "kernels", "sandbox", "store"), 2),
    "data": 3,
    **dict.fromkeys(("model", "program"), 3.5),
    **dict.fromkeys(
        ("adapters", "quantizers", "optimizers", "objectives", "schedules", "rewards", "strategies", "curators",
         "synthesizers", "mergers", "metrics", "probes", "prompt_optimizers", "exporters"), 4),
    **dict.fromkeys(("train", "infer", "merge", "curate", "trace"), 5),
    "recipes": 6,
    "server": 6.5,  # a surface of its own, which a command starts
    **dict.fromkeys(("cli", "studio", "api", "verbs"), 7),
}  # fmt: skip
FAMILY, MACHINE = 4, 5
WITHOUT_TORCH = ("core", "arithmetic", "sandbox", "store", "assets")
HEAVY = ("torch", "transformers", "peft", "jaxtyping")


def test_every_folder_has_a_floor() -> None:
    unknown = [folder for folder in folders() if folder not in FLOORS and folder not in ("__main__", "py")]
    assert not unknown, f"{', '.join(unknown)}: give it a floor in FLOORS, and say in the design why it is a new room"
    homeless = [family for family in families() if FLOORS.get(family) != FAMILY]
    assert not homeless, f"{', '.join(homeless)} hold methods but are no family (floor {FAMILY})"


def test_imports_go_down_only() -> None:
    wrong = [complaint for module in modules() for target, line in imported(module)
             if (complaint := complain(module, target, line))]  # fmt: skip
    assert not wrong, "\n" + "\n".join(wrong)


def test_nothing_inside_imports_the_facade() -> None:
    wrong = []
    inner = {module.name for module in modules()}
    for module in modules():
        for node in ast.walk(module.tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names if alias.name == "luthier"]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == "luthier":
                names = [alias.name for alias in node.names if f"luthier.{alias.name}" not in inner]
            wrong += [f"{module.shown}:{node.lineno}: imports {name} from the facade" for name in names]
    assert not wrong, "\n" + "\n".join([*wrong, "name the module it comes from"])


def test_relative_imports_are_not_used() -> None:
    wrong = [f"{module.shown}:{node.lineno}" for module in modules() for node in ast.walk(module.tree)
             if isinstance(node, ast.ImportFrom) and node.level > 0]  # fmt: skip
    assert not wrong, f"write the whole name: {', '.join(wrong)}"


def test_the_lowest_floors_are_free_of_torch() -> None:
    wrong = []
    for module in modules():
        if module.name.split(".")[1:2] and module.name.split(".")[1] in WITHOUT_TORCH:
            wrong += [f"{module.shown}:{line}: {target}" for target, line in imported(module)
                      if target.split(".")[0] in HEAVY]  # fmt: skip
    assert not wrong, "\n" + "\n".join([*wrong, f"{', '.join(WITHOUT_TORCH)} work without torch; move the piece up"])


def test_an_upward_arrow_is_seen_wherever_it_hides() -> None:
    hidden = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from luthier.train.loop import Loop
def f():
    import luthier.adapters.lora
    from luthier import recipes
    importlib.import_module("luthier.cli.main")
"""
    module = Module("luthier.data.x", modules()[0].path, ast.parse(hidden), 8)
    found = [target for target, line in imported(module) if complain(module, target, line)]
    assert found == ["luthier.train.loop", "luthier.adapters.lora", "luthier.recipes", "luthier.cli.main"]
    sibling = Module("luthier.adapters.x", modules()[0].path, ast.parse(""), 0)
    assert "siblings" in complain(sibling, "luthier.adapters.lora", 1)
    assert "families" in complain(sibling, "luthier.objectives", 1)
    assert complain(sibling, "luthier.adapters", 1) == ""
    machine = Module("luthier.train.x", modules()[0].path, ast.parse(""), 0)
    assert "contract" in complain(machine, "luthier.objectives.sft", 1)
    assert "each other" in complain(machine, "luthier.infer.engine", 1)
    assert complain(machine, "luthier.objectives", 1) == ""


def imported(module: Module) -> Iterator[tuple[str, int]]:
    """Every module that the file names in an import, with the line; in the order of the file."""
    known = {other.name for other in modules()}
    nodes = [node for node in ast.walk(module.tree) if isinstance(node, (ast.Import, ast.ImportFrom, ast.Call))]
    for node in sorted(nodes, key=lambda node: (node.lineno, node.col_offset)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                start = module.package.split(".")[: len(module.package.split(".")) - node.level + 1]
                base = ".".join([*start, base] if base else start)
            for alias in node.names:
                deeper = f"{base}.{alias.name}"
                yield (deeper if deeper in known or base == "luthier" else base), node.lineno
        elif ast.unparse(node.func).endswith(("import_module", "__import__", "require")):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield argument.value, node.lineno


def complain(module: Module, target: str, line: int) -> str:
    """What is wrong with an import, and what to do; empty when nothing is."""
    source_parts, target_parts = module.name.split("."), target.split(".")
    if target_parts[0] != "luthier" or len(target_parts) < 2 or len(source_parts) < 2:
        return ""
    source, goal = source_parts[1], target_parts[1]
    here, there = FLOORS.get(source), FLOORS.get(goal)
    if here is None or there is None:
        return ""
    start = f"{module.shown}:{line}: {module.name} (floor {here:g}) imports {target} (floor {there:g})"
    if source == goal:
        if here == FAMILY and len(source_parts) > 2 and len(target_parts) > 2 and source_parts[2] != target_parts[2]:
            return f"{start}: siblings never import siblings; move the shared piece to floor 3 or below"
        return ""
    if there > here:
        return f"{start}: arrows point only down; move the shared piece to floor {here:g} or below"
    if there == here:
        what = "families never import families" if here == FAMILY else "folders of one floor never import each other"
        return f"{start}: {what}; move the shared piece to floor {_below(here):g} or below"
    if here == MACHINE and there == FAMILY and len(target_parts) > 2:
        return f"{start}: a machine knows the contract of a family (luthier.{goal}), not its methods"
    return ""


def _below(floor: float) -> float:
    return max(other for other in FLOORS.values() if other < floor and other != 1.5)
